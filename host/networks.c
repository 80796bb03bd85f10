/* SPDX-License-Identifier: Apache-2.0 */
#include "host/networks.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

#define IPV4_BITS_BEFORE 96

static void map_ipv4(uint8_t out[16], const void *v4)
{
	memset(out, 0, 10);
	memset(out + 10, 0xff, 2);
	memcpy(out + 12, v4, 4);
}

static bool bit(const uint8_t *address, unsigned i)
{
	return address[i / 8] >> (7 - i % 8) & 1;
}

static int parse_one(char *word, struct network *out, struct error *err)
{
	uint8_t v4[4];
	char *slash = strchr(word, '/'), *end = NULL;
	if (slash)
		*slash = '\0';
	bool is_v4 = inet_pton(AF_INET, word, v4) == 1;
	if (is_v4)
		map_ipv4(out->address, v4);
	else if (inet_pton(AF_INET6, word, out->address) != 1)
		return error_set(err, EINVAL, "'%.64s' is no IP address", word);
	unsigned long most = is_v4 ? 32 : 128, bits = most;
	if (slash) {
		bits = strtoul(slash + 1, &end, 10);
		if (strspn(slash + 1, "0123456789") == 0 || *end || bits > most)
			return error_set(err, EINVAL, "'%.64s/%.16s': not a prefix from 0 to %lu", word,
					 slash + 1, most);
	}
	out->bits = (uint8_t)(bits + (is_v4 ? IPV4_BITS_BEFORE : 0));
	/* Somebody who writes 10.1.2.3/8 may mean either. */
	for (unsigned i = out->bits; i < 128; i++)
		if (bit(out->address, i))
			return error_set(err, EINVAL, "'%.64s/%lu': the address has bits behind the prefix",
					 word, bits);
	return 0;
}

int networks_parse(const char *text, struct networks *out, struct error *err)
{
	*out = (struct networks){0};
	CLEANUP_FREE char *copy = strdup(text);
	char *rest = NULL;
	if (!copy)
		return error_errno(err, ENOMEM, "networks");
	for (char *w = strtok_r(copy, ", \t", &rest); w; w = strtok_r(NULL, ", \t", &rest)) {
		if (out->count == NETWORKS_MAX)
			return error_set(err, EINVAL, "more than %d networks", NETWORKS_MAX);
		int rc = parse_one(w, &out->list[out->count], err);
		if (rc < 0)
			return rc;
		out->count++;
	}
	return out->count ? 0 : error_set(err, EINVAL, "no network");
}

bool networks_contain(const struct networks *n, const struct sockaddr_storage *address)
{
	uint8_t a[16];
	if (address->ss_family == AF_INET)
		map_ipv4(a, &((const struct sockaddr_in *)address)->sin_addr);
	else if (address->ss_family == AF_INET6)
		memcpy(a, &((const struct sockaddr_in6 *)address)->sin6_addr, 16);
	else
		return false;
	for (unsigned k = 0; k < n->count; k++) {
		unsigned i = 0;
		while (i < n->list[k].bits && bit(a, i) == bit(n->list[k].address, i))
			i++;
		if (i == n->list[k].bits)
			return true;
	}
	return false;
}
