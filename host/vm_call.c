/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdio.h>

#include "host/daemon.h"

int vm_connect(const struct vm_ref *vm, struct jsonl **out, struct error *err)
{
	char path[REGISTRY_PATH_BYTES + 16];
	snprintf(path, sizeof path, "%s/snvmm.sock", vm->dir);
	return jsonl_connect(path, 1000, out, err);
}

int vm_call(const struct vm_ref *vm, json_t *request, json_t **reply, int *exit_status, struct error *err)
{
	struct jsonl *j = NULL;
	int rc = request ? vm_connect(vm, &j, err) : error_errno(err, ENOMEM, "request");
	if (!rc)
		rc = jsonl_call(j, request, reply, exit_status, DAEMON_CALL_TIMEOUT_MS, err);
	jsonl_close(j);
	json_decref(request);
	return rc;
}
