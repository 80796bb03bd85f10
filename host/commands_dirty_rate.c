/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include "host/daemon.h"
#include "host/exit.h"

#define SECONDS_MAX 60

/* Passed on to the VM's snvmm, which takes its time. */
int command_dirty_rate(struct command_context *c, struct error *err)
{
	const char *name = json_string_value(json_object_get(c->request, "vm"));
	json_int_t seconds = json_integer_value(json_object_get(c->request, "seconds"));
	struct vm_ref vm;
	struct jsonl *vmm = NULL;
	json_t *reply = NULL;
	int status = EXIT_FAILED;
	if (!name || seconds < 1 || seconds > SECONDS_MAX)
		return error_set(err, EINVAL, "malformed request to measure a VM's dirty rate"), EXIT_USAGE;
	if (vm_find(c->daemon, name, &vm, err) < 0 || vm_check_arrived(c->daemon, &vm, err) < 0)
		return EXIT_REFUSED;
	if (!keeper_is_live(vm.keeper))
		return error_set(err, ESRCH, "VM %s does not run: it has no dirty rate", vm.rec.name),
		       EXIT_REFUSED;
	if (vm_connect(&vm, &vmm, err) < 0)
		return error_prefix(err, "VM %s", vm.rec.name), EXIT_FAILED;
	json_t *request = json_pack("{s:s, s:I}", "cmd", "dirty-rate", "seconds", seconds);
	int rc = jsonl_call(vmm, request, &reply, &status, (unsigned)seconds * 1000 + DAEMON_CALL_TIMEOUT_MS,
			    err);
	json_decref(request);
	jsonl_close(vmm);
	if (rc < 0)
		return rc == -EREMOTE && status ? status : EXIT_FAILED;
	reply_ok(c->client, reply);
	return 0;
}
