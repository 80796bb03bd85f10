/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/terminate.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include "base/log.h"
#include "vmm/move.h"

static void terminate_set(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGTERM);
}

void terminate_block(void)
{
	sigset_t set;
	terminate_set(&set);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
}

static void terminate_once(struct vm *vm, unsigned nth)
{
	enum vm_state state = vm_get_state(vm);
	/* first: a VM that moves while it is stopped is handed over as well */
	if (move_is_deciding(vm) || state == VM_IN_DOUBT) {
		log_warn("SIGTERM: not now, the VM is %s",
			 state == VM_IN_DOUBT ? vm_state_name(state) : "being handed over");
		return;
	}
	if (state == VM_INCOMING || state == VM_STOPPED) {
		log_warn("SIGTERM: this process runs no VM and ends");
		_exit(1);
	}
	if (nth == 1 && (state == VM_RUNNING || state == VM_PAUSED)) {
		log_info("SIGTERM: pressing the guest's power button");
		machine_power_button(vm->machine);
		return;
	}
	log_warn("SIGTERM again: the VM ends");
	vm_request_quit(vm, 0);
}

static void *terminate_main(void *arg)
{
	struct vm *vm = arg;
	sigset_t set;
	int sig;
	terminate_set(&set);
	pthread_setname_np(pthread_self(), "sigterm");
	for (unsigned nth = 1; sigwait(&set, &sig) == 0; nth++)
		terminate_once(vm, nth);
	return NULL;
}

int terminate_watch(struct vm *vm, struct error *err)
{
	pthread_t thread;
	int rc = pthread_create(&thread, NULL, terminate_main, vm);
	if (rc)
		return error_errno(err, rc, "thread");
	pthread_detach(thread);
	return 0;
}
