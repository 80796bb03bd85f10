/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <poll.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "vmm/move_destination.h"
#include "vmm/move_destination_hash.h"

int arrival_accept(struct arrival *a, int fd, struct conn **out, struct error *err)
{
	if (a->no_tls)
		return conn_from_fd(fd, out, err);
	int rc = conn_tls_accept(fd, a->tls, a->vm->cfg->silence_ms, out, err);
	if (rc)
		return rc;
	/* The token only routes: the certificate must be the control channel's. */
	if (strcmp(conn_peer_fingerprint(*out), a->fingerprint)) {
		rc = error_set(err, EPERM,
			       "a data channel came with another certificate (%s) than the control channel",
			       conn_peer_name(*out));
		conn_close(*out);
		*out = NULL;
	}
	return rc;
}

static int add_disk(struct arrival *a, unsigned i, struct conn *conn, struct error *err)
{
	struct vm *vm = a->vm;
	pthread_mutex_lock(&a->lock);
	bool assembled = a->assembled;
	pthread_mutex_unlock(&a->lock);
	if (arrival_is_shared(a, i)) {
		conn_close(conn);
		return error_set(err, EPROTO, "disk %s: both hosts see it, nothing is copied",
				 vm->def.disks[i].id);
	}
	if (!assembled) {
		conn_close(conn);
		return error_set(err, EPROTO, "disk %s: not open yet", vm->def.disks[i].id);
	}
	struct nbd_server_options opt = {
		.export_name = vm->def.disks[i].id,
		.block = vm->disks[i].local,
		.max_connections = 4,
		.handshake_timeout_ms = vm->cfg->silence_ms,
		.observe = a->hash ? arrival_hash_observe : NULL,
		.observer = arrival_hash_witness(a, i),
	};
	pthread_mutex_lock(&a->lock);
	struct nbd_server *old = steal_ptr(a->nbd[i]);
	pthread_mutex_unlock(&a->lock);
	/* The fence: a session that broke is drained and closed before its successor may write. */
	nbd_server_free(old);
	struct nbd_server *s;
	int rc = nbd_server_create(&opt, &s, err);
	if (rc) {
		conn_close(conn);
		return rc;
	}
	/* Under the lock that COMMIT takes, and before the first request is read: nothing of the peer writes
	 * to a disk that may be the running guest's. */
	SCOPE_LOCK(&a->lock);
	if (a->channels_over || a->commit) {
		nbd_server_free(s);
		conn_close(conn);
		return error_set(err, ESHUTDOWN, "disk %s: no session is taken any more",
				 vm->def.disks[i].id);
	}
	rc = nbd_server_add(s, conn, err);
	if (rc)
		nbd_server_free(s);
	else
		a->nbd[i] = s;
	return rc;
}

static int take_channel(struct arrival *a, json_t *msg, int fd, struct error *err)
{
	const char *channel = json_string_value(json_object_get(msg, "channel"));
	const char *token = json_string_value(json_object_get(msg, "token"));
	if (!channel || !token) {
		close(fd);
		return error_set(err, EPROTO, "daemon: a descriptor without channel and token");
	}
	bool disk = !strcmp(channel, "disk");
	unsigned layer = 0;
	while (disk && layer < a->nlayers && strcmp(a->layer_token[layer], token))
		layer++;
	bool is_layer = disk && layer < a->nlayers;
	unsigned n = disk ? a->vm->def.ndisks : a->nstreams, i;
	unsigned late = disk ? MEM_POSTCOPY_CHANNELS : arrival_postcopy_token(a, token);
	bool is_late = late < MEM_POSTCOPY_CHANNELS;
	for (i = 0; i < n; i++)
		if (!strcmp(disk ? a->disk_token[i] : a->memory_token[i], token))
			break;
	if (i == n && !is_layer && !is_late) {
		close(fd);
		return error_set(err, EPERM, "a %s channel with a token of another kind", channel);
	}
	struct conn *conn = NULL;
	int rc = arrival_accept(a, fd, &conn, err);
	if (rc)
		return error_prefix(err, "%s channel %u", channel, i);
	if (is_layer)
		return arrival_layer_add(a, layer, conn, err);
	if (is_late)
		return arrival_postcopy_add(a, late, conn, err);
	if (disk)
		return add_disk(a, i, conn, err);
	SCOPE_LOCK(&a->lock);
	if (a->channels_over || a->memory[i]) {
		conn_close(conn);
		return error_set(err, EEXIST, "memory channel %u is there already", i);
	}
	a->memory[i] = conn;
	a->nmemory++;
	pthread_cond_broadcast(&a->changed);
	return 0;
}

static void *router_thread(void *arg)
{
	struct arrival *a = arg;
	for (;;) {
		pthread_mutex_lock(&a->lock);
		bool over = a->channels_over;
		pthread_mutex_unlock(&a->lock);
		if (over)
			return NULL;
		if (!jsonl_pending(a->daemon)) {
			struct pollfd p = {.fd = jsonl_fd(a->daemon), .events = POLLIN};
			if (poll(&p, 1, 100) <= 0)
				continue;
		}
		json_t *msg = NULL;
		int fd = -1;
		struct error err = ERROR_INIT;
		int rc = jsonl_read(a->daemon, &msg, &fd, 1000, &err);
		if (rc == -ETIMEDOUT)
			continue;
		if (rc) {
			/* The daemon went: what is connected goes on. */
			log_info("daemon's stream: %s", err.message);
			return NULL;
		}
		if (fd >= 0 && take_channel(a, msg, fd, &err))
			log_warn("%s", err.message);
		json_decref(msg);
	}
}

int arrival_tokens(struct arrival *a, struct error *err)
{
	json_t *list = json_array();
	int rc = 0;
	for (unsigned i = 0; !rc && i < a->vm->def.ndisks; i++) {
		rc = token_generate(a->disk_token[i], err);
		json_array_append_new(list, json_string(a->disk_token[i]));
	}
	for (unsigned i = 0; !rc && i < a->nstreams; i++) {
		rc = token_generate(a->memory_token[i], err);
		json_array_append_new(list, json_string(a->memory_token[i]));
	}
	for (unsigned i = 0; !rc && i < a->nlayers; i++) {
		rc = token_generate(a->layer_token[i], err);
		json_array_append_new(list, json_string(a->layer_token[i]));
	}
	for (unsigned i = 0; !rc && a->faults_fd >= 0 && i < MEM_POSTCOPY_CHANNELS; i++) {
		rc = token_generate(a->postcopy_token[i], err);
		json_array_append_new(list, json_string(a->postcopy_token[i]));
	}
	json_t *q = json_pack("{s:s, s:o}", "cmd", "tokens", "tokens", list), *reply = NULL;
	if (!rc)
		rc = jsonl_call(a->daemon, q, &reply, NULL, DAEMON_ANSWER_MS, err);
	json_decref(q);
	json_decref(reply);
	if (rc)
		return rc;
	rc = pthread_create(&a->router, NULL, router_thread, a);
	if (rc)
		return error_errno(err, rc, "thread");
	a->router_started = true;
	return 0;
}

int arrival_receiver_start(struct arrival *a, struct error *err)
{
	if (a->vm->cold)
		return 0;
	uint64_t deadline = clock_now_ns() + a->vm->cfg->silence_ms * UINT64_C(1000000);
	struct timespec until = clock_timespec(deadline);
	pthread_mutex_lock(&a->lock);
	while (a->nmemory < a->nstreams && a->channel_up)
		if (pthread_cond_timedwait(&a->changed, &a->lock, &until))
			break;
	unsigned n = a->nmemory;
	pthread_mutex_unlock(&a->lock);
	if (n < a->nstreams)
		return error_set(err, ETIMEDOUT, "%u of %u memory channels came", n, a->nstreams);
	struct mem_receiver_options opt = {
		.space = machine_memory_space(a->vm->machine),
		.streams = a->memory,
		.nstreams = a->nstreams,
		.timeout_ms = a->vm->cfg->silence_ms,
		.epoch = a->epoch,
		.postcopy = a->faults_fd >= 0,
		.prefault = a->prefault,
		.deltas = a->deltas,
	};
	struct mem_receiver *r;
	int rc = arrival_postcopy_create(a, err);
	if (!rc)
		rc = mem_receiver_start(&opt, &r, err);
	if (rc)
		return rc;
	SCOPE_LOCK(&a->lock);
	a->receiver = r;
	return 0;
}

void arrival_storage_stop(struct arrival *a)
{
	for (unsigned i = 0; i < a->vm->def.ndisks; i++) {
		pthread_mutex_lock(&a->lock);
		struct nbd_server *s = steal_ptr(a->nbd[i]);
		pthread_mutex_unlock(&a->lock);
		nbd_server_free(s);
	}
}

void arrival_channels_close(struct arrival *a)
{
	pthread_mutex_lock(&a->lock);
	a->channels_over = true;
	pthread_cond_broadcast(&a->changed);
	pthread_mutex_unlock(&a->lock);
	if (a->router_started)
		pthread_join(a->router, NULL);
	a->router_started = false;
	arrival_layer_close(a);
	arrival_storage_stop(a);
	/* The link's reader shuts these down when the link fails: it must not find one that is being freed.
	 */
	struct conn *memory[MEM_STREAMS_MAX] = {0};
	pthread_mutex_lock(&a->lock);
	struct mem_receiver *receiver = steal_ptr(a->receiver);
	for (unsigned i = 0; i < a->nstreams; i++)
		memory[i] = steal_ptr(a->memory[i]);
	pthread_mutex_unlock(&a->lock);
	mem_receiver_free(receiver);
	for (unsigned i = 0; i < a->nstreams; i++)
		conn_close(memory[i]);
}
