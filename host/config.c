/* SPDX-License-Identifier: Apache-2.0 */
#include "host/config.h"

#include <errno.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/fsutil.h"
#include "host/ini.h"
#include "host/vmdef.h"

struct loader {
	struct host_config *cfg;
	char folder[PATH_MAX]; /* of the file: relative paths start there */
	char seen[32][96];     /* "section label key" already given */
	unsigned nseen;
	unsigned peer_rights; /* of the present [peer]: given already */
};

int host_address_normalize(const char *v, char *out, size_t size, struct error *err)
{
	const char *port = NULL;
	size_t host = strlen(v);
	if (*v == '[') {
		const char *end = strchr(v, ']');
		if (!end || (end[1] && end[1] != ':'))
			return error_set(err, EINVAL, "'%.100s' is not ADDRESS:PORT", v);
		port = end[1] ? end + 2 : NULL;
		host = (size_t)(end + 1 - v);
	} else {
		const char *colon = strchr(v, ':');
		if (colon && strchr(colon + 1, ':'))
			return error_set(err, EINVAL, "write an IPv6 address in brackets: [%.100s]", v);
		if (colon) {
			port = colon + 1;
			host = (size_t)(colon - v);
		}
	}
	unsigned number = HOST_PORT;
	if (port) {
		struct ini_entry p = {.key = "port", .value = port};
		struct error why = ERROR_INIT;
		if (ini_get_uint(&p, 0, 65535, &number, &why) < 0)
			return error_set(err, EINVAL, "'%.100s' has no valid port", v);
	}
	if (host == 0 || strpbrk(v, " \t/") ||
	    (size_t)snprintf(out, size, "%.*s:%u", (int)host, v, number) >= size)
		return error_set(err, EINVAL, "'%.100s' is not ADDRESS:PORT", v);
	return 0;
}

static int set_address(const struct ini_entry *e, char *out, size_t size, struct error *err)
{
	return host_address_normalize(e->value, out, size, err) < 0 ? error_prefix(err, "%s", e->key) : 0;
}

static int set_networks(const struct ini_entry *e, struct networks *out, struct error *err)
{
	return networks_parse(e->value, out, err) < 0 ? error_prefix(err, "%s", e->key) : 0;
}

static int set_peer_names(const struct ini_entry *e, char *out, size_t size, struct error *err)
{
	int rc = ini_get_string(e, out, size, err);
	if (rc < 0)
		return rc;
	char list[1024], *rest = NULL;
	snprintf(list, sizeof list, "%s", out);
	for (char *w = strtok_r(list, ", \t", &rest); w; w = strtok_r(NULL, ", \t", &rest))
		if (!name_chars_valid(w))
			return error_set(err, EINVAL, "%s: '%.64s' is not a host name", e->key, w);
	return 0;
}

static int set_path(const struct loader *l, const struct ini_entry *e, char *out, size_t size,
		    struct error *err)
{
	char whole[2 * PATH_MAX];
	if (!*e->value)
		return error_set(err, EINVAL, "%s: empty", e->key);
	int n = *e->value == '/' ? snprintf(whole, sizeof whole, "%s", e->value)
				 : snprintf(whole, sizeof whole, "%s/%s", l->folder, e->value);
	if (n < 0 || (size_t)n >= size)
		return error_set(err, EINVAL, "%s: path longer than %zu bytes", e->key, size - 1);
	memcpy(out, whole, (size_t)n + 1);
	return 0;
}

static int set_name(const struct ini_entry *e, char *out, size_t size, struct error *err)
{
	if (!name_chars_valid(e->value))
		return error_set(err, EINVAL,
				 "%s: '%.64s' is not a host name (letters, digits, '.', '_', '-')", e->key,
				 e->value);
	return ini_get_string(e, out, size, err);
}

static int refuse_duplicate(struct loader *l, const struct ini_entry *e, struct error *err)
{
	char mark[96];
	snprintf(mark, sizeof mark, "%.20s %.20s", e->section, e->key);
	for (unsigned i = 0; i < l->nseen; i++)
		if (!strcmp(l->seen[i], mark))
			return error_set(err, EINVAL, "[%s] %s: given twice", e->section, e->key);
	if (l->nseen < ARRAY_SIZE(l->seen))
		strcpy(l->seen[l->nseen++], mark);
	return 0;
}

static int on_host(struct loader *l, const struct ini_entry *e, struct error *err)
{
	struct host_config *c = l->cfg;
	if (!strcmp(e->key, "name"))
		return set_name(e, c->name, sizeof c->name, err);
	if (!strcmp(e->key, "listen"))
		return set_address(e, c->listen, sizeof c->listen, err);
	if (!strcmp(e->key, "state-dir"))
		return set_path(l, e, c->state_dir, sizeof c->state_dir - 256, err);
	if (!strcmp(e->key, "control"))
		return set_path(l, e, c->control, sizeof c->control, err);
	if (!strcmp(e->key, "migration-address"))
		return set_address(e, c->migration_address, sizeof c->migration_address, err);
	if (!strcmp(e->key, "allow-from"))
		return set_networks(e, &c->allow_from, err);
	if (!strcmp(e->key, "deny-from"))
		return set_networks(e, &c->deny_from, err);
	if (!strcmp(e->key, "deny-peers"))
		return set_peer_names(e, c->deny_peers, sizeof c->deny_peers, err);
	return -ENOKEY;
}

static int on_tls(struct loader *l, const struct ini_entry *e, struct error *err)
{
	struct host_config *c = l->cfg;
	if (!strcmp(e->key, "ca"))
		return set_path(l, e, c->ca, sizeof c->ca, err);
	if (!strcmp(e->key, "cert"))
		return set_path(l, e, c->cert, sizeof c->cert, err);
	if (!strcmp(e->key, "key"))
		return set_path(l, e, c->key, sizeof c->key, err);
	return -ENOKEY;
}

static int on_network(struct loader *l, const struct ini_entry *e, struct error *err)
{
	if (!strcmp(e->key, "bridges"))
		return ini_get_string(e, l->cfg->bridges, sizeof l->cfg->bridges, err);
	return -ENOKEY;
}

static bool plain_absolute(const char *path)
{
	if (*path != '/' || strlen(path) >= PATH_MAX)
		return false;
	for (const char *p = path; *p == '/';) {
		size_t n = strcspn(++p, "/");
		if (n == 0 || (n == 1 && *p == '.') || (n == 2 && !strncmp(p, "..", 2)))
			return false;
		p += n;
	}
	return true;
}

static int on_devices(struct loader *l, const struct ini_entry *e, struct error *err)
{
	if (strcmp(e->key, "allow"))
		return -ENOKEY;
	for (const char *p = e->value; *p; p += strcspn(p, ",")) {
		p += strspn(p, ", \t");
		if (*p != '/')
			return error_set(err, EINVAL, "allow: '%.100s' is no absolute path", p);
	}
	return ini_get_string(e, l->cfg->devices, sizeof l->cfg->devices, err);
}

static int on_shared(struct loader *l, const struct ini_entry *e, struct error *err)
{
	if (strcmp(e->key, "path"))
		return -ENOKEY;
	for (const char *p = e->value; *p; p += strcspn(p, ",")) {
		char one[PATH_MAX];
		p += strspn(p, ", \t");
		size_t n = strcspn(p, ",");
		while (n > 1 && strchr(" \t/", p[n - 1]))
			n--;
		snprintf(one, sizeof one, "%.*s", (int)(n < sizeof one ? n : sizeof one - 1), p);
		if (!plain_absolute(one))
			return error_set(err, EINVAL,
					 "path: '%.100s' is no absolute path without \".\" and \"..\"", one);
	}
	return ini_get_string(e, l->cfg->shared, sizeof l->cfg->shared, err);
}

static int on_backing(struct loader *l, const struct ini_entry *e, struct error *err)
{
	struct host_config *c = l->cfg;
	if (!e->key) {
		if (!name_chars_valid(e->label))
			return error_set(err, EINVAL, "[backing %.64s]: not a name", e->label);
		for (unsigned i = 0; i < c->nbackings; i++)
			if (!strcmp(c->backings[i].name, e->label))
				return error_set(err, EINVAL, "[backing %s]: given twice", e->label);
		if (c->nbackings == HOST_BACKINGS_MAX)
			return error_set(err, EINVAL, "more than %d backing files", HOST_BACKINGS_MAX);
		snprintf(c->backings[c->nbackings++].name, sizeof c->backings->name, "%s", e->label);
		return 0;
	}
	struct host_backing *b = &c->backings[c->nbackings - 1];
	if (!strcmp(e->key, "path") && !*b->path)
		return set_path(l, e, b->path, sizeof b->path, err);
	if (!strcmp(e->key, "format") && !*b->format)
		return strcmp(e->value, "raw") && strcmp(e->value, "qcow2")
			       ? error_set(err, EINVAL, "format: '%.64s' is neither raw nor qcow2", e->value)
			       : ini_get_string(e, b->format, sizeof b->format, err);
	if (!strcmp(e->key, "path") || !strcmp(e->key, "format"))
		return error_set(err, EINVAL, "[backing %s] %s: given twice", b->name, e->key);
	return -ENOKEY;
}

static int on_limits(struct loader *l, const struct ini_entry *e, struct error *err)
{
	struct host_config *c = l->cfg;
	if (!strcmp(e->key, "silence-ms"))
		return ini_get_uint(e, 200, 3600000, &c->silence_ms, err);
	if (!strcmp(e->key, "max-incoming"))
		return ini_get_uint(e, 0, 1024, &c->max_incoming, err);
	if (!strcmp(e->key, "moves-per-link"))
		return ini_get_uint(e, 1, 64, &c->moves_per_link, err);
	if (!strcmp(e->key, "mirror-grace-ms"))
		return ini_get_uint(e, 1, 60000, &c->mirror_grace_ms, err);
	if (!strcmp(e->key, "drain-timeout-ms"))
		return ini_get_uint(e, 100, 600000, &c->drain_timeout_ms, err);
	if (!strcmp(e->key, "retry-for"))
		return ini_get_duration(e, HOST_RETRY_FOR_MAX_S, &c->retry_for_s, err);
	if (!strcmp(e->key, "keep-partial"))
		return ini_get_duration(e, HOST_KEEP_PARTIAL_MAX_S, &c->keep_partial_s, err);
	if (!strcmp(e->key, "certificate-validity")) {
		int rc = ini_get_duration(e, HOST_CERTIFICATE_MAX_S, &c->certificate_s, err);
		return !rc && c->certificate_s < HOST_CERTIFICATE_MIN_S
			       ? error_set(err, EINVAL, "%s: less than %u s", e->key, HOST_CERTIFICATE_MIN_S)
			       : rc;
	}
	if (!strcmp(e->key, "allow-no-tls"))
		return ini_get_bool(e, &c->allow_no_tls, err);
	return -ENOKEY;
}

static int on_programs(struct loader *l, const struct ini_entry *e, struct error *err)
{
	if (!strcmp(e->key, "snvmm"))
		return set_path(l, e, l->cfg->snvmm, sizeof l->cfg->snvmm, err);
	if (!strcmp(e->key, "cgroup"))
		return set_path(l, e, l->cfg->cgroup, sizeof l->cfg->cgroup, err);
	return -ENOKEY;
}

static int on_peer(struct loader *l, const struct ini_entry *e, struct error *err)
{
	struct host_config *c = l->cfg;
	if (!e->key) {
		if (!name_chars_valid(e->label))
			return error_set(err, EINVAL, "[peer %.64s]: not a host name", e->label);
		if (host_config_peer(c, e->label))
			return error_set(err, EINVAL, "[peer %s]: given twice", e->label);
		if (c->npeers == HOST_PEERS_MAX)
			return error_set(err, EINVAL, "more than %d peers", HOST_PEERS_MAX);
		struct host_peer *made = &c->peers[c->npeers++];
		l->peer_rights = 0;
		*made = (struct host_peer){.may_send = true, .may_receive = true};
		snprintf(made->name, sizeof made->name, "%s", e->label);
		return 0;
	}
	struct host_peer *peer = &c->peers[c->npeers - 1];
	const struct {
		const char *key;
		bool *right;
	} rights[] = {{"send", &peer->may_send},
		      {"receive", &peer->may_receive},
		      {"administer", &peer->may_administer}};
	for (unsigned i = 0; i < ARRAY_SIZE(rights); i++)
		if (!strcmp(e->key, rights[i].key)) {
			if (l->peer_rights & 1u << i)
				return error_set(err, EINVAL, "[peer %s] %s: given twice", peer->name,
						 e->key);
			l->peer_rights |= 1u << i;
			return ini_get_bool(e, rights[i].right, err);
		}
	if (strcmp(e->key, "address"))
		return -ENOKEY;
	if (*peer->address)
		return error_set(err, EINVAL, "[peer %s] address: given twice", peer->name);
	return set_address(e, peer->address, sizeof peer->address, err);
}

static int on_entry(void *opaque, const struct ini_entry *e, struct error *err)
{
	static const struct {
		const char *section;
		int (*set)(struct loader *, const struct ini_entry *, struct error *);
	} sections[] = {{"host", on_host},	  {"tls", on_tls},	 {"network", on_network},
			{"devices", on_devices},  {"shared", on_shared}, {"limits", on_limits},
			{"programs", on_programs}};
	struct loader *l = opaque;
	int rc = -ENOKEY;
	if (!strcmp(e->section, "peer")) {
		rc = on_peer(l, e, err);
	} else if (!strcmp(e->section, "backing")) {
		rc = on_backing(l, e, err);
	} else {
		size_t i = 0;
		while (i < ARRAY_SIZE(sections) && strcmp(e->section, sections[i].section))
			i++;
		if (i == ARRAY_SIZE(sections))
			return error_set(err, EINVAL, "unknown section [%.64s]", e->section);
		if (*e->label)
			return error_set(err, EINVAL, "[%s] takes no name", e->section);
		if (!e->key)
			return 0;
		rc = sections[i].set(l, e, err);
		if (!rc)
			rc = refuse_duplicate(l, e, err);
	}
	if (rc == -ENOKEY)
		return error_set(err, EINVAL, "unknown key '%.64s' in [%s]", e->key, e->section);
	return rc;
}

/* Beside our own executable; PATH as a last resort. */
static void default_snvmm(struct host_config *c)
{
	char self[PATH_MAX];
	ssize_t n = readlink("/proc/self/exe", self, sizeof self - 16);
	if (n > 0) {
		self[n] = '\0';
		char *slash = strrchr(self, '/');
		if (slash) {
			strcpy(slash + 1, "snvmm");
			snprintf(c->snvmm, sizeof c->snvmm, "%s", self);
			return;
		}
	}
	strcpy(c->snvmm, "snvmm");
}

/* The host's own name up to the first dot, as far as it is one. */
static void default_name(struct host_config *c)
{
	char own[256] = "";
	if (gethostname(own, sizeof own - 1) < 0)
		return;
	own[strcspn(own, ".")] = '\0';
	if (name_chars_valid(own))
		snprintf(c->name, sizeof c->name, "%s", own);
}

static int check_tls(const struct host_config *c, struct error *err)
{
	const struct {
		const char *what, *value;
	} files[] = {{"ca", c->ca}, {"cert", c->cert}, {"key", c->key}};
	bool any = *c->ca || *c->cert || *c->key;
	for (size_t i = 0; any && i < ARRAY_SIZE(files); i++)
		if (!*files[i].value)
			return error_set(err, EINVAL, "%s: [tls] %s is missing", c->path, files[i].what);
	return c->npeers && !any
		       ? error_set(err, EINVAL,
				   "%s: [peer %s] needs the certificates of a [tls] section; without one "
				   "hosts are paired (snmigrate pair)",
				   c->path, c->peers[0].name)
		       : 0;
}

static int finish(struct host_config *c, struct error *err)
{
	if (!*c->name)
		default_name(c);
	if (!*c->name)
		return error_set(err, EINVAL, "%s: [host] name is missing, and this host's own is not one",
				 c->path);
	if (!*c->state_dir)
		strcpy(c->state_dir, HOST_STATE_DIR_DEFAULT);
	int rc = check_tls(c, err);
	if (rc < 0)
		return rc;
	for (unsigned i = 0; i < c->npeers; i++)
		if (!*c->peers[i].address)
			return error_set(err, EINVAL, "%s: [peer %s] address is missing", c->path,
					 c->peers[i].name);
	for (unsigned i = 0; i < c->nbackings; i++)
		if (!*c->backings[i].path || !*c->backings[i].format)
			return error_set(err, EINVAL, "%s: [backing %s] %s is missing", c->path,
					 c->backings[i].name, *c->backings[i].path ? "format" : "path");
	if (!*c->control) {
		int n = snprintf(c->control, sizeof c->control, "%.107s/control.sock", c->state_dir);
		if (n < 0 || (size_t)n >= sizeof c->control)
			return error_set(err, EINVAL,
					 "%s: state-dir is too long for a socket in it; set [host] control "
					 "to a shorter path",
					 c->path);
	}
	if (!strncmp(c->migration_address, "0.0.0.0:", 8) || !strncmp(c->migration_address, "[::]:", 5))
		return error_set(err, EINVAL,
				 "%s: migration-address is what other hosts dial: one address of this host",
				 c->path);
	if (!*c->listen)
		snprintf(c->listen, sizeof c->listen, "0.0.0.0:%d", HOST_PORT);
	if (!*c->snvmm)
		default_snvmm(c);
	return 0;
}

int host_config_parse(const char *text, size_t len, const char *path, struct host_config **out,
		      struct error *err)
{
	struct host_config *c = calloc(1, sizeof *c);
	struct loader l = {.cfg = c};
	if (!c || !(c->peers = calloc(HOST_PEERS_MAX, sizeof *c->peers)) ||
	    !(c->backings = calloc(HOST_BACKINGS_MAX, sizeof *c->backings))) {
		host_config_free(c);
		return error_errno(err, ENOMEM, "%s", path);
	}
	c->silence_ms = 10000;
	c->max_incoming = 8;
	c->moves_per_link = 2;
	c->drain_timeout_ms = 5000;
	c->mirror_grace_ms = 50;
	c->retry_for_s = HOST_RETRY_FOR_S;
	c->keep_partial_s = HOST_KEEP_PARTIAL_S;
	c->certificate_s = HOST_CERTIFICATE_S;
	snprintf(c->path, sizeof c->path, "%s", path);
	snprintf(l.folder, sizeof l.folder, "%s", path);
	char *slash = strrchr(l.folder, '/');
	if (slash)
		*slash = '\0';
	int rc = ini_parse_text(text, len, path, on_entry, &l, err);
	if (!rc)
		rc = finish(c, err);
	if (rc < 0) {
		host_config_free(c);
		return rc;
	}
	*out = c;
	return 0;
}

int host_config_load(const char *path, struct host_config **out, struct error *err)
{
	CLEANUP_FREE char *whole = realpath(path, NULL);
	CLEANUP_FREE char *text = NULL;
	size_t len;
	if (!whole)
		return error_errno(err, errno, "%s", path);
	int rc = fs_read_file(whole, INI_TEXT_MAX_BYTES, &text, &len, err);
	return rc < 0 ? rc : host_config_parse(text, len, whole, out, err);
}

void host_config_free(struct host_config *c)
{
	if (!c)
		return;
	free(c->peers);
	free(c->backings);
	free(c);
}

const struct host_peer *host_config_peer(const struct host_config *c, const char *name)
{
	for (unsigned i = 0; i < c->npeers; i++)
		if (!strcmp(c->peers[i].name, name))
			return &c->peers[i];
	return NULL;
}

bool host_config_peer_denied(const struct host_config *c, const char *name)
{
	size_t n = strlen(name);
	for (const char *p = c->deny_peers; n && *p; p += strcspn(p, ", \t")) {
		p += strspn(p, ", \t");
		if (strcspn(p, ", \t") == n && !memcmp(p, name, n))
			return true;
	}
	return false;
}

bool host_config_network_allowed(const struct host_config *c, const struct sockaddr_storage *address)
{
	return !networks_contain(&c->deny_from, address) &&
	       (!c->allow_from.count || networks_contain(&c->allow_from, address));
}

bool host_config_device_allowed(const struct host_config *c, const char *path)
{
	char list[sizeof c->devices];
	if (!plain_absolute(path))
		return false;
	strcpy(list, c->devices);
	char *rest = NULL;
	for (char *p = strtok_r(list, ", \t", &rest); p; p = strtok_r(NULL, ", \t", &rest))
		if (!fnmatch(p, path, FNM_PATHNAME))
			return true;
	return false;
}
