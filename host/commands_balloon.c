/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include "host/daemon.h"
#include "host/exit.h"

/* Passed on to the VM's snvmm: how much of its memory the guest is to keep. */
int command_balloon(struct command_context *c, struct error *err)
{
	const char *name = json_string_value(json_object_get(c->request, "vm"));
	json_t *bytes = json_object_get(c->request, "bytes");
	struct vm_ref vm;
	int status = EXIT_FAILED;
	if (!name || !json_is_integer(bytes))
		return error_set(err, EINVAL, "malformed request to set a VM's balloon"), EXIT_USAGE;
	if (vm_find(c->daemon, name, &vm, err) < 0 || vm_check_arrived(c->daemon, &vm, err) < 0)
		return EXIT_REFUSED;
	if (!keeper_is_live(vm.keeper))
		return error_set(err, ESRCH, "VM %s does not run: it has all of its memory at its next start",
				 vm.rec.name),
		       EXIT_REFUSED;
	json_t *request = json_pack("{s:s, s:O}", "cmd", "balloon", "bytes", bytes);
	int rc = vm_call(&vm, request, NULL, &status, err);
	if (rc < 0)
		return rc == -EREMOTE && status ? status : EXIT_FAILED;
	reply_ok(c->client, NULL);
	return 0;
}
