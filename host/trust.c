/* SPDX-License-Identifier: Apache-2.0 */
/* The peers, and the files of the paired ones. */
#include "host/trust.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/fsutil.h"
#include "host/vmdef.h"

#define PEER_FILE_MAX_BYTES (16u << 10)
#define PEER_SUFFIX	    ".json"
#define PEERS_FOLDER	    "trust/peers"

static void cleanup_json(json_t **o)
{
	json_decref(*o);
}

static void free_dir(DIR **d)
{
	if (*d)
		closedir(*d);
}

static int peer_file(const struct host_config *cfg, const char *name, char out[REGISTRY_PATH_BYTES],
		     struct error *err)
{
	char rel[REGISTRY_FOLDER_BYTES];
	if (!name_chars_valid(name))
		return error_set(err, EINVAL, "'%.64s' is not a host name", name);
	snprintf(rel, sizeof rel, PEERS_FOLDER "/%s" PEER_SUFFIX, name);
	return registry_path(cfg, rel, out, err);
}

int trust_lock(const struct host_config *cfg, struct error *err)
{
	char path[REGISTRY_PATH_BYTES];
	int rc = registry_path(cfg, "trust/lock", path, err);
	if (rc < 0)
		return rc;
	CLEANUP_FD int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0 || flock(fd, LOCK_EX) < 0)
		return error_errno(err, errno, "%s", path);
	return steal_fd(&fd);
}

int trust_prepare(const struct host_config *cfg, struct error *err)
{
	char path[REGISTRY_PATH_BYTES];
	int rc = registry_path(cfg, PEERS_FOLDER, path, err);
	return rc ? rc : fs_make_dirs(path, err);
}

/* ---- the file of a paired host ---- */

static bool copy_text(const json_t *o, const char *key, char *out, size_t size)
{
	const char *s = json_string_value(json_object_get(o, key));
	return s && (size_t)snprintf(out, size, "%s", s) < size;
}

static bool certificate_from_json(const json_t *o, struct trust_certificate *c)
{
	const json_t *end = json_object_get(o, "not_after");
	c->not_after = json_integer_value(end);
	return json_is_integer(end) && copy_text(o, "sha256", c->sha256, sizeof c->sha256) &&
	       strlen(c->sha256) == TRUST_FINGERPRINT_CHARS;
}

static bool peer_from_json(const json_t *o, struct trust_peer *p)
{
	json_t *list = json_object_get(o, "certificates");
	*p = (struct trust_peer){.paired = true,
				 .may_send = json_is_true(json_object_get(o, "send")),
				 .may_receive = json_is_true(json_object_get(o, "receive")),
				 .may_administer = json_is_true(json_object_get(o, "administer")),
				 .paired_at = json_integer_value(json_object_get(o, "paired"))};
	if (!copy_text(o, "name", p->name, sizeof p->name) || !name_chars_valid(p->name) ||
	    !copy_text(o, "address", p->address, sizeof p->address) ||
	    !copy_text(o, "knows", p->knows, sizeof p->knows))
		return false;
	if (json_array_size(list) == 0 || json_array_size(list) > TRUST_CERTIFICATES_MAX)
		return false;
	for (; p->ncertificates < json_array_size(list); p->ncertificates++)
		if (!certificate_from_json(json_array_get(list, p->ncertificates),
					   &p->certificates[p->ncertificates]))
			return false;
	return true;
}

static json_t *peer_to_json(const struct trust_peer *p)
{
	json_t *list = json_array();
	for (unsigned i = 0; i < p->ncertificates; i++)
		json_array_append_new(list, json_pack("{s:s, s:I}", "sha256", p->certificates[i].sha256,
						      "not_after", (json_int_t)p->certificates[i].not_after));
	return json_pack("{s:s, s:s, s:b, s:b, s:b, s:s, s:I, s:o}", "name", p->name, "address", p->address,
			 "send", (int)p->may_send, "receive", (int)p->may_receive, "administer",
			 (int)p->may_administer, "knows", p->knows, "paired", (json_int_t)p->paired_at,
			 "certificates", list);
}

static int peer_load(const struct host_config *cfg, const char *name, struct trust_peer *out,
		     struct error *err)
{
	char path[REGISTRY_PATH_BYTES];
	CLEANUP_FREE char *text = NULL;
	size_t len;
	int rc = peer_file(cfg, name, path, err);
	if (!rc)
		rc = fs_read_file(path, PEER_FILE_MAX_BYTES, &text, &len, err);
	if (rc < 0)
		return rc;
	CLEANUP(cleanup_json) json_t *o = json_loadb(text, len, JSON_REJECT_DUPLICATES, NULL);
	if (!o || !peer_from_json(o, out) || strcmp(out->name, name))
		return error_set(err, EUCLEAN, "%s cannot be read; unpair that host and pair it again", path);
	return 0;
}

static int peer_store(const struct host_config *cfg, const struct trust_peer *p, struct error *err)
{
	char path[REGISTRY_PATH_BYTES], name[HOST_NAME_MAX_CHARS + sizeof PEER_SUFFIX];
	CLEANUP(cleanup_json) json_t *o = peer_to_json(p);
	CLEANUP_FREE char *text = o ? json_dumps(o, JSON_INDENT(2)) : NULL;
	if (!text)
		return error_errno(err, ENOMEM, "host %s", p->name);
	int rc = registry_path(cfg, PEERS_FOLDER, path, err);
	CLEANUP_FD int dirfd = rc ? -1 : fs_open_dir(path, err);
	if (rc || dirfd < 0)
		return rc ? rc : dirfd;
	snprintf(name, sizeof name, "%s" PEER_SUFFIX, p->name);
	return fs_write_file_at(dirfd, name, text, strlen(text), 0600, err);
}

/* ---- finding ---- */

static void from_config(const struct host_config *cfg, const struct host_peer *c, struct trust_peer *out)
{
	*out = (struct trust_peer){.may_send = c->may_send,
				   .may_receive = c->may_receive,
				   .may_administer = c->may_administer,
				   .denied = host_config_peer_denied(cfg, c->name)};
	snprintf(out->name, sizeof out->name, "%s", c->name);
	snprintf(out->address, sizeof out->address, "%s", c->address);
}

int trust_peer_find(const struct host_config *cfg, const char *name, struct trust_peer *out,
		    struct error *err)
{
	char folder[REGISTRY_PATH_BYTES] = PEERS_FOLDER;
	const struct host_peer *configured = host_config_peer(cfg, name);
	if (configured) {
		from_config(cfg, configured, out);
	} else {
		struct error why = ERROR_INIT;
		int rc = peer_load(cfg, name, out, &why);
		registry_path(cfg, PEERS_FOLDER, folder, NULL);
		if (rc == -ENOENT || rc == -EINVAL)
			return error_set(
				err, ENOENT,
				"no host named %.63s: %s has no [peer %.63s], and it is not paired (%s)",
				name, cfg->path, name, folder);
		if (rc < 0) {
			error_copy(err, &why);
			return rc;
		}
		out->denied = host_config_peer_denied(cfg, name);
	}
	return out->denied ? error_set(err, EPERM, "host %s is refused by [host] deny-peers of %s", name,
				       cfg->path)
			   : 0;
}

static int refuse(const struct host_config *cfg, const struct trust_peer *p, const char *what,
		  const char *key, struct error *err)
{
	return p->paired ? error_set(err, EPERM, "host %s may not %s %s (on %s: snmigrate peers set %s +%s)",
				     p->name, what, cfg->name, cfg->name, p->name, key)
			 : error_set(err, EPERM, "host %s may not %s %s ([peer %s] %s = no in %s)", p->name,
				     what, cfg->name, p->name, key, cfg->path);
}

int trust_refuse_send(const struct host_config *cfg, const struct trust_peer *peer, struct error *err)
{
	return refuse(cfg, peer, "send VMs to", "send", err);
}

int trust_refuse_administer(const struct host_config *cfg, const struct trust_peer *peer, struct error *err)
{
	return refuse(cfg, peer, "administer", "administer", err);
}

int trust_refuse_receive(const struct host_config *cfg, const struct trust_peer *peer, struct error *err)
{
	return refuse(cfg, peer, "receive VMs from", "receive", err);
}

/* Names of files, "" when it is none of ours. */
static void name_of_file(const char *file, char name[HOST_NAME_MAX_CHARS + 1])
{
	size_t n = strlen(file), suffix = strlen(PEER_SUFFIX);
	name[0] = '\0';
	if (n <= suffix || n - suffix > HOST_NAME_MAX_CHARS || strcmp(file + n - suffix, PEER_SUFFIX))
		return;
	memcpy(name, file, n - suffix);
	name[n - suffix] = '\0';
	if (!name_chars_valid(name))
		name[0] = '\0';
}

int trust_peers_each(const struct host_config *cfg, int (*each)(void *opaque, const struct trust_peer *peer),
		     void *opaque, struct error *err)
{
	struct trust_peer p;
	int rc = 0;
	for (unsigned i = 0; !rc && i < cfg->npeers; i++) {
		from_config(cfg, &cfg->peers[i], &p);
		rc = each(opaque, &p);
	}
	char path[REGISTRY_PATH_BYTES], name[HOST_NAME_MAX_CHARS + 1];
	if (!rc)
		rc = registry_path(cfg, PEERS_FOLDER, path, err);
	if (rc)
		return rc;
	CLEANUP(free_dir) DIR *dir = opendir(path);
	if (!dir)
		return errno == ENOENT ? 0 : error_errno(err, errno, "%s", path);
	for (struct dirent *de; !rc && (de = readdir(dir));) {
		name_of_file(de->d_name, name);
		/* one that is removed or damaged meanwhile is not trusted: the others are no less so */
		if (!*name || host_config_peer(cfg, name) || peer_load(cfg, name, &p, NULL) < 0)
			continue;
		p.denied = host_config_peer_denied(cfg, name);
		rc = each(opaque, &p);
	}
	return rc;
}

/* ---- changing ---- */

static bool has_certificate(const struct trust_peer *p, const char *sha256)
{
	for (unsigned i = 0; i < p->ncertificates; i++)
		if (!strcmp(p->certificates[i].sha256, sha256))
			return true;
	return false;
}

struct count {
	const struct trust_peer *new;
	unsigned others;
	char same[HOST_NAME_MAX_CHARS + 1]; /* who has its certificate already */
};

static int count_one(void *opaque, const struct trust_peer *p)
{
	struct count *c = opaque;
	if (!strcmp(p->name, c->new->name))
		return 0;
	c->others++;
	if (has_certificate(p, c->new->certificates[0].sha256))
		strcpy(c->same, p->name);
	return 0;
}

/* *p gets the rights that it has already. */
static int check_new(const struct host_config *cfg, struct trust_peer *p, struct error *err)
{
	struct trust_peer old;
	if (!name_chars_valid(p->name) || !p->ncertificates)
		return error_set(err, EINVAL, "'%.64s' is not a host name", p->name);
	if (!strcmp(p->name, cfg->name))
		return error_set(err, EEXIST, "both hosts are named %s; set [host] name of one of them",
				 p->name);
	if (host_config_peer(cfg, p->name))
		return error_set(err, EEXIST, "host %s has a [peer %s] in %s already", cfg->name, p->name,
				 cfg->path);
	if (host_config_peer_denied(cfg, p->name))
		return error_set(err, EPERM, "host %s is refused by [host] deny-peers of %s", p->name,
				 cfg->path);
	struct count c = {.new = p};
	int rc = trust_peers_each(cfg, count_one, &c, err);
	if (rc < 0)
		return rc;
	if (*c.same)
		return error_set(err, EEXIST, "that certificate is host %s's, which is paired here already",
				 c.same);
	if (c.others >= HOST_PEERS_MAX)
		return error_set(err, ENOSPC, "more than %d peers", HOST_PEERS_MAX);
	rc = peer_load(cfg, p->name, &old, err);
	if (rc < 0)
		return rc == -ENOENT ? 0 : rc;
	if (!has_certificate(&old, p->certificates[0].sha256))
		return error_set(err, EEXIST,
				 "host %s is paired already, with another certificate (SHA-256 %.16s..., now "
				 "%.16s...); if it was installed anew: snmigrate unpair %s",
				 p->name, old.certificates[0].sha256, p->certificates[0].sha256, p->name);
	p->may_send = old.may_send;
	p->may_receive = old.may_receive;
	p->may_administer = old.may_administer;
	return 0;
}

int trust_peer_check(const struct host_config *cfg, const struct trust_peer *peer, struct error *err)
{
	struct trust_peer p = *peer;
	return check_new(cfg, &p, err);
}

int trust_peer_add(const struct host_config *cfg, const struct trust_peer *peer, struct error *err)
{
	struct trust_peer p = *peer;
	CLEANUP_FD int held = trust_lock(cfg, err);
	if (held < 0)
		return held;
	int rc = check_new(cfg, &p, err);
	return rc < 0 ? rc : peer_store(cfg, &p, err);
}

int trust_peer_remove(const struct host_config *cfg, const char *name, struct error *err)
{
	char path[REGISTRY_PATH_BYTES], folder[REGISTRY_PATH_BYTES];
	if (host_config_peer(cfg, name))
		return error_set(err, EPERM, "host %s is not paired: it is [peer %s] of %s; remove it there",
				 name, name, cfg->path);
	int rc = peer_file(cfg, name, path, err);
	if (!rc)
		rc = registry_path(cfg, PEERS_FOLDER, folder, err);
	if (rc < 0)
		return rc;
	CLEANUP_FD int held = trust_lock(cfg, err);
	if (held < 0)
		return held;
	if (unlink(path) < 0)
		return errno == ENOENT ? error_set(err, ENOENT, "host %.63s is not paired (%s)", name, folder)
				       : error_errno(err, errno, "%s", path);
	return fs_sync_dir(folder, err);
}

int trust_peer_change(const struct host_config *cfg, const char *name,
		      int (*change)(struct trust_peer *peer, void *opaque, struct error *err), void *opaque,
		      struct error *err)
{
	struct trust_peer p;
	if (host_config_peer(cfg, name))
		return error_set(err, EPERM,
				 "host %s is not paired: it is [peer %s] of %s; set send, receive and "
				 "administer there",
				 name, name, cfg->path);
	CLEANUP_FD int held = trust_lock(cfg, err);
	if (held < 0)
		return held;
	int rc = peer_load(cfg, name, &p, err);
	if (rc == -ENOENT)
		return error_set(err, ENOENT, "host %.63s is not paired", name);
	if (!rc)
		rc = change(&p, opaque, err);
	return rc < 0 ? rc : peer_store(cfg, &p, err);
}
