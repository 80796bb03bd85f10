/* SPDX-License-Identifier: Apache-2.0 */
#include "tui/text.h"

#include <stdio.h>
#include <string.h>
#include <wctype.h>

/* One character by RFC 3629, or -1; *len gets how many bytes it took (1 if it is none). */
static int32_t decode(const unsigned char *s, unsigned *len)
{
	static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
	unsigned n = *s < 0x80		       ? 1
		     : *s >= 0xc2 && *s < 0xe0 ? 2
		     : (*s & 0xf0) == 0xe0     ? 3
		     : *s >= 0xf0 && *s < 0xf5 ? 4
					       : 0;
	uint32_t c = n == 1 ? *s : n ? *s & (0x7fu >> n) : 0;
	*len = 1;
	if (!n)
		return -1;
	for (unsigned i = 1; i < n; i++) {
		if ((s[i] & 0xc0) != 0x80) /* also at the end of the string */
			return -1;
		c = c << 6 | (s[i] & 0x3f);
	}
	if (c < least[n] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000))
		return -1;
	*len = n;
	return (int32_t)c;
}

/* Characters that are printable by iswprint, but change how others are shown. */
static bool is_format(uint32_t c)
{
	return c == 0xad || c == 0x61c || (c >= 0x200b && c <= 0x200f) || (c >= 0x2028 && c <= 0x202e) ||
	       (c >= 0x2060 && c <= 0x206f) || c == 0xfeff || (c >= 0xfff9 && c <= 0xfffb) ||
	       (c >= 0xe0000 && c < 0xe1000);
}

wchar_t text_next(const char **p, unsigned *cells)
{
	unsigned len;
	*cells = 1;
	if (!**p)
		return 0;
	int32_t c = decode((const unsigned char *)*p, &len);
	*p += len;
	if (c < 0x20 || (c >= 0x7f && c < 0xa0) || is_format((uint32_t)c) || !iswprint((wint_t)c))
		return L'?';
	int width = wcwidth((wchar_t)c);
	if (width != 1 && width != 2)
		return L'?';
	*cells = (unsigned)width;
	return (wchar_t)c;
}

size_t text_encode(uint32_t c, char out[4])
{
	if (c < 0x80)
		return out[0] = (char)c, 1;
	size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
	for (size_t i = n - 1; i > 0; i--, c >>= 6)
		out[i] = (char)(0x80 | (c & 0x3f));
	out[0] = (char)((0xf00u >> n & 0xff) | c);
	return n;
}

void text_clean(char *dst, size_t size, const char *src)
{
	size_t at = 0;
	unsigned cells;
	for (wchar_t c; src && (c = text_next(&src, &cells));) {
		char bytes[4];
		size_t n = text_encode((uint32_t)c, bytes);
		if (at + n >= size)
			break;
		memcpy(dst + at, bytes, n);
		at += n;
	}
	dst[at] = '\0';
}

unsigned text_cells(const char *text)
{
	unsigned n = 0, cells;
	while (text_next(&text, &cells))
		n += cells;
	return n;
}

const char *text_bytes(double n, char buf[TEXT_BYTES])
{
	static const char *const units[] = {"B", "kB", "MB", "GB", "TB", "PB", "EB"};
	unsigned u = 0;
	if (!(n >= 0))
		n = 0;
	while (n >= 999.5 && u < 6) {
		n /= 1000;
		u++;
	}
	if (n > 9999) /* of nothing that exists */
		n = 9999;
	snprintf(buf, TEXT_BYTES, u && n < 99.95 ? "%.1f %s" : "%.0f %s", n, units[u]);
	return buf;
}

const char *text_clock(uint64_t ms, char buf[TEXT_BYTES])
{
	uint64_t s = ms / 1000;
	unsigned minutes = (unsigned)(s / 60 % 60), seconds = (unsigned)(s % 60);
	if (s < 3600)
		snprintf(buf, TEXT_BYTES, "%u:%02u", minutes, seconds);
	else
		snprintf(buf, TEXT_BYTES, "%llu:%02u:%02u", (unsigned long long)(s / 3600), minutes, seconds);
	return buf;
}

const char *text_span(uint64_t ms, char buf[TEXT_BYTES])
{
	if (ms < 1000)
		snprintf(buf, TEXT_BYTES, "%u ms", (unsigned)ms);
	else if (ms < 60000)
		snprintf(buf, TEXT_BYTES, "%.1f s", (double)(ms / 100) / 10);
	else
		text_clock(ms, buf);
	return buf;
}
