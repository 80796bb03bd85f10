/* SPDX-License-Identifier: Apache-2.0 */
/* What several hosts' processors have in common, and what a VM is to see of one. */
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "host/check.h"
#include "host/daemon.h"
#include "host/exit.h"
#include "host/fsutil.h"
#include "host/ini.h"
#include "host/registry.h"

#define CPU_TEXT_MAX (256u << 10)
#define HOSTS_MAX    HOST_PEERS_MAX

/* All that the descriptor gives, as JSON. */
static json_t *read_json(int fd)
{
	CLEANUP_FREE char *text = malloc(CPU_TEXT_MAX);
	size_t len = 0;
	ssize_t n = 1;
	while (text && n > 0 && len < CPU_TEXT_MAX) {
		n = read(fd, text + len, CPU_TEXT_MAX - len);
		if (n < 0 && errno == EINTR)
			n = 1;
		else if (n > 0)
			len += (size_t)n;
	}
	return text && len < CPU_TEXT_MAX ? json_loadb(text, len, 0, NULL) : NULL;
}

/* Only snvmm speaks with KVM. */
static int own_cpu(const struct host_config *cfg, json_t **out, struct error *err)
{
	extern char **environ;
	const char *const argv[] = {cfg->snvmm, "--describe-cpu", NULL};
	int fds[2], status = 0;
	if (pipe2(fds, O_CLOEXEC) < 0)
		return error_errno(err, errno, "pipe");
	posix_spawn_file_actions_t acts;
	posix_spawn_file_actions_init(&acts);
	posix_spawn_file_actions_adddup2(&acts, fds[1], STDOUT_FILENO);
	pid_t pid;
	int rc = posix_spawn(&pid, cfg->snvmm, &acts, NULL, (char *const *)(uintptr_t)argv, environ);
	posix_spawn_file_actions_destroy(&acts);
	close(fds[1]);
	*out = rc ? NULL : read_json(fds[0]);
	close(fds[0]);
	if (rc)
		return error_errno(err, rc, "%s", cfg->snvmm);
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	return *out ? 0 : error_set(err, EIO, "%s does not tell what CPU this host has", cfg->snvmm);
}

static int cpu_of(struct daemon *d, const char *host, json_t **out, struct error *err)
{
	if (!strcmp(host, d->cfg->name))
		return own_cpu(d->cfg, out, err);
	CLEANUP_FREE struct check_facts *f = calloc(1, sizeof *f);
	json_t *question = json_pack("{s:[], s:b}", "bridges", "measure", 0), *facts = NULL;
	if (!f || !question)
		return error_errno(err, ENOMEM, "baseline");
	snprintf(f->there, sizeof f->there, "%s", host);
	int rc = check_ask(d->cfg, host, question, false, f, &facts, err);
	*out = rc ? NULL : json_incref(json_object_get(facts, "cpu"));
	json_decref(facts);
	json_decref(question);
	return rc;
}

/* What the host has, into *common, or taken out of it. */
static int add_host(struct daemon *d, const char *host, bool first, struct cpu_features *common,
		    struct error *err)
{
	json_t *cpu = NULL;
	CLEANUP_FREE struct kvm_cpuid2 *table = NULL;
	struct cpu_features own;
	uint32_t khz;
	int rc = cpu_of(d, host, &cpu, err);
	if (!rc)
		rc = cpu_from_json(cpu, &table, &khz, err);
	json_decref(cpu);
	if (rc)
		return error_prefix(err, "host %.63s", host);
	cpu_features_of(table, &own);
	if (first)
		*common = own;
	else if (strcmp(own.vendor, common->vendor))
		return error_set(err, ENOTSUP,
				 "host %.63s has a CPU of %s, those before it of %s: they have no baseline",
				 host, own.vendor, common->vendor);
	else
		cpu_features_and(common, &own);
	return 0;
}

int command_baseline(struct command_context *c, struct error *err)
{
	const json_t *hosts = json_object_get(c->request, "hosts");
	struct cpu_features common;
	size_t i;
	json_t *v;
	if (!json_array_size(hosts) || json_array_size(hosts) > HOSTS_MAX)
		return error_set(err, EINVAL, "baseline: from 1 to %d hosts are needed", HOSTS_MAX),
		       EXIT_USAGE;
	json_array_foreach(hosts, i, v)
	{
		const char *host = json_string_value(v);
		if (!host)
			return error_set(err, EINVAL, "baseline: a host is no text"), EXIT_USAGE;
		if (add_host(c->daemon, host, i == 0, &common, err))
			return EXIT_REFUSED;
	}
	CLEANUP_FREE char *lines = cpu_baseline_lines(&common);
	if (!lines)
		return error_errno(err, ENOMEM, "baseline"), EXIT_FAILED;
	reply_ok(c->client, json_pack("{s:s, s:s}", "vendor", common.vendor, "features", lines));
	return 0;
}

/* ---- set ---- */

static int set_cpu(struct vm_definition *def, const char *value, const char *base, struct error *err)
{
	int rc = vmdef_set_cpu(def, value, err);
	/* what it stands for is in the file */
	if (!rc && !strcmp(def->cpu, "baseline"))
		rc = error_set(err, EINVAL, "cpu: which baseline? baseline:FILE");
	return rc ? rc : vmdef_read_baseline(def, base, err);
}

static int change(struct daemon *d, struct vm_ref *vm, json_t *request, struct error *err)
{
	const char *key = json_string_value(json_object_get(request, "key"));
	const char *value = json_string_value(json_object_get(request, "value"));
	const char *base = json_string_value(json_object_get(request, "base_dir"));
	const struct ini_entry entry = {.key = key, .value = value};
	CLEANUP_FREE struct vm_definition *def = malloc(sizeof *def);
	CLEANUP_FD int dirfd = fs_open_dir(vm->dir, err);
	bool balloon = false;
	if (!def || dirfd < 0)
		return def ? err->code : error_errno(err, ENOMEM, "set");
	int rc = registry_load_definition(dirfd, vm->rec.name, def, err);
	if (rc)
		return rc;
	if (!strcmp(key, "cpu"))
		rc = set_cpu(def, value, base, err);
	else if (!strcmp(key, "balloon"))
		rc = ini_get_bool(&entry, &balloon, err);
	else
		rc = error_set(err, EINVAL, "'%.64s' is nothing that can be set: cpu and balloon are", key);
	if (!rc && !strcmp(key, "balloon"))
		vmdef_set_balloon(def, balloon);
	return rc ? rc : registry_store_definition(dirfd, def, err);
}

int command_set(struct command_context *c, struct error *err)
{
	struct daemon *d = c->daemon;
	const char *name = json_string_value(json_object_get(c->request, "vm"));
	const char *base = json_string_value(json_object_get(c->request, "base_dir"));
	struct vm_ref vm;
	struct record *r = NULL;
	if (!name || !base || *base != '/' || !json_is_string(json_object_get(c->request, "key")) ||
	    !json_is_string(json_object_get(c->request, "value")))
		return error_set(err, EINVAL, "malformed request to set something of a VM"), EXIT_USAGE;
	int rc = vm_find(d, name, &vm, err);
	if (!rc)
		rc = vm_check_arrived(d, &vm, err);
	if (rc < 0)
		return EXIT_REFUSED;
	/* with the record's lock no snvmm begins with one half of it */
	pthread_mutex_lock(&vm.keeper->op);
	if (keeper_is_live(vm.keeper))
		rc = error_set(
			err, EBUSY,
			"VM %s is not stopped: what it sees cannot change while it runs (snvm stop %s)",
			vm.rec.name, vm.rec.name);
	if (!rc)
		rc = record_open(d->cfg->state_dir, vm.rec.uuid, &r, err);
	if (!rc)
		rc = record_lock(r, 2000, err);
	if (!rc)
		rc = record_load(r, &vm.rec, err);
	if (!rc)
		rc = handover_may_start(&vm.rec, err);
	if (!rc)
		rc = change(d, &vm, c->request, err);
	record_close(r);
	pthread_mutex_unlock(&vm.keeper->op);
	keeper_wake(vm.keeper);
	if (rc < 0)
		return EXIT_REFUSED;
	log_info("VM %s: %s = %s", vm.rec.name, json_string_value(json_object_get(c->request, "key")),
		 json_string_value(json_object_get(c->request, "value")));
	reply_ok(c->client, NULL);
	return 0;
}
