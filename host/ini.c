/* SPDX-License-Identifier: Apache-2.0 */
#include "host/ini.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/fsutil.h"

static bool is_space(char c)
{
	return c == ' ' || c == '\t';
}

static char *trim(char *s)
{
	while (is_space(*s))
		s++;
	size_t n = strlen(s);
	while (n > 0 && is_space(s[n - 1]))
		s[--n] = '\0';
	return s;
}

/* "#" and ";" first on a line, ";" after white space. */
static void strip_comment(char *s)
{
	char *start = s + strspn(s, " \t");
	if (*start == '#' || *start == ';') {
		*start = '\0';
		return;
	}
	for (char *p = start; *p; p++)
		if (*p == ';' && p > start && is_space(p[-1])) {
			*p = '\0';
			return;
		}
}

static int check_line(const char *line, size_t len, struct error *err)
{
	if (len > INI_LINE_MAX_BYTES)
		return error_set(err, EINVAL, "line longer than %d bytes", INI_LINE_MAX_BYTES);
	for (size_t i = 0; i < len; i++) {
		unsigned char c = (unsigned char)line[i];
		if ((c < 0x20 && c != '\t') || c == 0x7f)
			return error_set(err, EINVAL, "control character 0x%02x", c);
	}
	return 0;
}

static int parse_header(char *s, char **section, char **label, struct error *err)
{
	char *end = strchr(s, ']');
	if (!end)
		return error_set(err, EINVAL, "section header without ']'");
	if (end[1] != '\0')
		return error_set(err, EINVAL, "text after the section header");
	*end = '\0';
	*section = trim(s + 1);
	*label = *section + strcspn(*section, " \t");
	if (**label) {
		*(*label)++ = '\0';
		*label = trim(*label);
	}
	if (!**section)
		return error_set(err, EINVAL, "empty section name");
	return 0;
}

static int parse_line(char *line, char *section, char *label, struct ini_entry *entry, struct error *err)
{
	strip_comment(line);
	char *s = trim(line);
	if (!*s)
		return 0;
	if (*s == '[') {
		char *sec = NULL, *lab = NULL;
		int rc = parse_header(s, &sec, &lab, err);
		if (rc < 0)
			return rc;
		strcpy(section, sec);
		strcpy(label, lab);
		entry->key = NULL;
		entry->value = "";
		return 1;
	}
	char *eq = strchr(s, '=');
	if (!eq)
		return error_set(err, EINVAL, "expected 'key = value' or '[section]'");
	*eq = '\0';
	entry->key = trim(s);
	entry->value = trim(eq + 1);
	/* "key =;comment" must not become a value that reads as a comment when it is written again */
	if (*entry->value == ';')
		entry->value = "";
	if (!*entry->key)
		return error_set(err, EINVAL, "no key before '='");
	if (!*section)
		return error_set(err, EINVAL, "'%.64s' stands before the first [section]", entry->key);
	return 1;
}

int ini_parse_text(const char *text, size_t len, const char *origin, ini_handler_fn handler, void *opaque,
		   struct error *err)
{
	struct error local = ERROR_INIT;
	err = err ? err : &local;
	/* section and label are parts of one line each */
	CLEANUP_FREE char *buf = malloc(3 * (INI_LINE_MAX_BYTES + 1));
	if (!buf)
		return error_errno(err, ENOMEM, "%s", origin);
	char *section = buf + INI_LINE_MAX_BYTES + 1, *label = section + INI_LINE_MAX_BYTES + 1;
	*section = *label = '\0';
	if (len > INI_TEXT_MAX_BYTES)
		return error_set(err, EINVAL, "%s: larger than %u bytes", origin, INI_TEXT_MAX_BYTES);

	unsigned number = 0;
	for (size_t at = 0; at < len;) {
		const char *line = text + at;
		const char *nl = memchr(line, '\n', len - at);
		size_t n = nl ? (size_t)(nl - line) : len - at;
		at += n + 1;
		number++;
		if (n > 0 && line[n - 1] == '\r')
			n--;
		if (number == 1 && n >= 3 && !memcmp(line, "\xef\xbb\xbf", 3)) {
			line += 3;
			n -= 3;
		}
		struct ini_entry entry = {.section = section, .label = label, .line = number};
		int rc = check_line(line, n, err);
		if (!rc) {
			memcpy(buf, line, n);
			buf[n] = '\0';
			rc = parse_line(buf, section, label, &entry, err);
			if (rc > 0)
				rc = handler(opaque, &entry, err);
		}
		if (rc < 0) {
			error_prefix(err, "%s:%u", origin, number);
			return rc;
		}
	}
	return 0;
}

int ini_parse_path(const char *path, ini_handler_fn handler, void *opaque, struct error *err)
{
	CLEANUP_FREE char *text = NULL;
	size_t len;
	int rc = fs_read_file(path, INI_TEXT_MAX_BYTES, &text, &len, err);
	if (rc < 0)
		return rc;
	return ini_parse_text(text, len, path, handler, opaque, err);
}

int ini_get_string(const struct ini_entry *entry, char *out, size_t size, struct error *err)
{
	size_t n = strlen(entry->value);
	if (n == 0)
		return error_set(err, EINVAL, "%s: empty", entry->key);
	if (n >= size)
		return error_set(err, EINVAL, "%s: longer than %zu bytes", entry->key, size - 1);
	memcpy(out, entry->value, n + 1);
	return 0;
}

int ini_get_uint(const struct ini_entry *entry, unsigned min, unsigned max, unsigned *out, struct error *err)
{
	const char *s = entry->value;
	unsigned long long v = 0;
	bool good = *s >= '0' && *s <= '9';
	if (good) {
		char *end;
		errno = 0;
		v = strtoull(s, &end, 10);
		good = !*end && !errno && v >= min && v <= max;
	}
	if (!good)
		return error_set(err, EINVAL, "%s: '%.64s' is not a number from %u to %u", entry->key, s, min,
				 max);
	*out = (unsigned)v;
	return 0;
}

int ini_get_bool(const struct ini_entry *entry, bool *out, struct error *err)
{
	static const char *const yes[] = {"yes", "true", "on", "1"}, *const no[] = {"no", "false", "off",
										    "0"};
	for (size_t i = 0; i < ARRAY_SIZE(yes); i++) {
		if (!strcasecmp(entry->value, yes[i])) {
			*out = true;
			return 0;
		}
		if (!strcasecmp(entry->value, no[i])) {
			*out = false;
			return 0;
		}
	}
	return error_set(err, EINVAL, "%s: '%.64s' is neither yes nor no", entry->key, entry->value);
}

int size_parse(const char *text, uint64_t *out)
{
	if (*text < '0' || *text > '9')
		return -EINVAL;
	char *end;
	errno = 0;
	unsigned long long v = strtoull(text, &end, 10);
	if (errno)
		return -EINVAL;
	unsigned shift = 0;
	switch (*end) {
	case '\0':
		break;
	case 'k':
	case 'K':
		shift = 10;
		break;
	case 'm':
	case 'M':
		shift = 20;
		break;
	case 'g':
	case 'G':
		shift = 30;
		break;
	case 't':
	case 'T':
		shift = 40;
		break;
	default:
		return -EINVAL;
	}
	if (*end && strcmp(end + 1, "") && strcmp(end + 1, "iB"))
		return -EINVAL;
	if (v > (UINT64_MAX >> shift))
		return -EINVAL;
	*out = (uint64_t)v << shift;
	return 0;
}

int ini_get_size(const struct ini_entry *entry, uint64_t *out, struct error *err)
{
	if (size_parse(entry->value, out) < 0)
		return error_set(err, EINVAL, "%s: '%.64s' is not a size (such as 512M or 2G)", entry->key,
				 entry->value);
	return 0;
}

int duration_parse(const char *text, unsigned max_s, unsigned *out_s)
{
	static const struct {
		char letter;
		unsigned seconds;
	} units[] = {{'\0', 1}, {'s', 1}, {'m', 60}, {'h', 3600}, {'d', 86400}};
	if (*text < '0' || *text > '9')
		return -EINVAL;
	char *end;
	errno = 0;
	unsigned long v = strtoul(text, &end, 10);
	if (errno || (*end && end[1]))
		return -EINVAL;
	for (size_t i = 0; i < ARRAY_SIZE(units); i++)
		if (*end == units[i].letter && v <= max_s / units[i].seconds) {
			*out_s = (unsigned)v * units[i].seconds;
			return 0;
		}
	return -EINVAL;
}

int ini_get_duration(const struct ini_entry *entry, unsigned max_s, unsigned *out_s, struct error *err)
{
	if (duration_parse(entry->value, max_s, out_s) < 0)
		return error_set(err, EINVAL,
				 "%s: '%.64s' is not a time from 0 to %u s (such as 30s, 5m or 2h)",
				 entry->key, entry->value, max_s);
	return 0;
}
