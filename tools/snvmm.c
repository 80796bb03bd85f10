/* SPDX-License-Identifier: Apache-2.0 */
/* The VMM of one VM: started by snmigrated, either to run a VM of the registry or to receive one. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/confine.h"
#include "base/log.h"
#include "host/exit.h"
#include "host/jsonl.h"
#include "host/pair_serve.h"
#include "host/registry.h"
#include "vmm/control.h"
#include "vmm/move.h"
#include "vmm/terminate.h"
#include "vmm/view.h"
#include "vmm/vm.h"

#define CONNECTION_FD 3
#define DAEMON_FD     4
#define COLD_IDLE_MS  30000

static void usage(FILE *out)
{
	fputs("Usage: snvmm --config FILE --vm NAME [--paused] [--forced] | --cold\n"
	      "       snvmm --config FILE --incoming [--paired]\n"
	      "       snvmm --config FILE --pair          (these two: connection on descriptor 3, daemon on "
	      "4)\n"
	      "       snvmm --config FILE --check-image FOLDER IMAGE [BELOW...]\n"
	      "       snvmm --describe-cpu\n"
	      "\n"
	      "The virtual machine monitor of one VM. snmigrated starts it; people use snvm and snmigrate.\n"
	      "  --config FILE   the host's configuration\n"
	      "  --vm NAME       run this VM of the registry\n"
	      "  --paused        do not start its processors\n"
	      "  --forced        after resolve --run-here: do not ask the other host first\n"
	      "  --cold          do not run it: it is to be moved while it is stopped\n"
	      "  --incoming      serve one control connection: a question, or an arriving VM\n"
	      "  --paired        the other side proves itself as a paired host, not by the CA\n"
	      "  --pair          serve one host that wants to be paired with this one\n"
	      "  --check-image   open a qcow2 image, and the files below it, and say what is wrong with it\n"
	      "  --describe-cpu  print what guests see of this host's processor, as JSON\n"
	      "  --help, --version\n",
	      out);
}

enum run_how { RUN, RUN_PAUSED, RUN_FORCED, RUN_COLD };

/* A VM that is stopped, and the lock that keeps it so. */
static int open_cold(struct vm *vm, const struct vm_record *rec, struct error *err)
{
	int rc = handover_may_move(rec, err);
	if (!rc && rec->flags & RECORD_POWERED_ON)
		rc = error_set(err, EPERM, "VM %s is crashed, not stopped", rec->name);
	vm->cold = true;
	if (!rc)
		rc = vm_open_disks(vm, err);
	return rc ? rc : control_start(vm, err);
}

/* Opens the VM of the registry and starts it. */
static int open_vm(struct vm *vm, const char *name, enum run_how how, struct error *err)
{
	bool paused = how == RUN_PAUSED, forced = how == RUN_FORCED;
	int rc = registry_vm_dir(vm->cfg, name, vm->dir, err);
	if (rc)
		return rc;
	vm->dirfd = open(vm->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (vm->dirfd < 0)
		return error_errno(err, errno, "VM %s: %s", name, vm->dir);
	rc = registry_load_definition(vm->dirfd, name, &vm->def, err);
	if (!rc) /* vm.ini may have been written by hand */
		rc = vmdef_read_baseline(&vm->def, vm->dir, err);
	if (!rc)
		rc = view_restrict(vm, err);
	if (!rc)
		rc = record_open(vm->cfg->state_dir, vm->def.uuid, &vm->record, err);
	if (!rc)
		rc = record_lock(vm->record, 2000, err);
	struct vm_record rec;
	if (!rc)
		rc = vm_record(vm, &rec, err);
	if (!rc && how == RUN_COLD)
		return open_cold(vm, &rec, err);
	/* --forced: resolve --run-here wrote owner-unconfirmed, and starts it this once without asking. */
	if (!rc && !(forced && rec.state == HANDOVER_OWNER_UNCONFIRMED && rec.flags & RECORD_FORCED))
		rc = handover_may_start(&rec, err);
	if (!rc)
		rc = vm_open_disks(vm, err);
	if (!rc)
		rc = vm_create_machine(vm, NULL, err);
	if (!rc)
		rc = vm_load_kernel(vm, true, err);
	if (!rc)
		rc = vm_mark_powered_on(vm, true, err);
	if (!rc && !paused)
		rc = machine_start(vm->machine, err);
	if (rc)
		return rc;
	vm_set_state(vm, paused ? VM_PAUSED : VM_RUNNING, NULL);
	if (rec.state == HANDOVER_OWNER_UNCONFIRMED && (rc = move_forced_start(vm, err)))
		return rc;
	return control_start(vm, err);
}

/* Until the guest ends or somebody wants the process gone. */
static int live(struct vm *vm)
{
	for (;;) {
		pthread_mutex_lock(&vm->lock);
		while (!vm->quit && !vm->guest_stopped && !vm->guest_crashed)
			pthread_cond_wait(&vm->changed, &vm->lock);
		bool stopped = vm->guest_stopped, crashed = vm->guest_crashed;
		int status = vm->exit_status;
		pthread_mutex_unlock(&vm->lock);
		/* A move must not go on to its end in a VMM that is going. */
		move_source_guest_gone(vm, stopped   ? "the guest powered itself off"
					   : crashed ? "the guest crashed"
						     : "the VM was stopped");
		struct error err = ERROR_INIT;
		struct vm_record rec;
		/* A crashed guest keeps the mark: powered on without a VMM is what "crashed" means. */
		if (crashed)
			status = EXIT_CRASHED;
		else if (!vm_record(vm, &rec, &err) &&
			 (rec.state == HANDOVER_OWNER || rec.state == HANDOVER_OWNER_UNCONFIRMED) &&
			 vm_mark_powered_on(vm, false, &err))
			log_error("record: %s", err.message);
		vm_set_state(vm, crashed ? VM_CRASHED : VM_STOPPED, NULL);
		return status;
	}
}

/* Whoever started this process asks for the move at once, unless it died. */
static void await_move(struct vm *vm)
{
	uint64_t at = clock_now_ns() + COLD_IDLE_MS * UINT64_C(1000000);
	struct timespec until = clock_timespec(at);
	SCOPE_LOCK(&vm->lock);
	while (!vm->quit && !vm->move && clock_now_ns() < at)
		pthread_cond_timedwait(&vm->changed, &vm->lock, &until);
	if (!vm->move)
		vm->quit = true;
}

static int run_vm(const struct host_config *cfg, const char *name, enum run_how how)
{
	struct vm vm;
	struct error err = ERROR_INIT;
	vm_init(&vm, cfg);
	int status = 1;
	if (terminate_watch(&vm, &err) || open_vm(&vm, name, how, &err)) {
		log_error("%s", err.message);
	} else {
		if (how == RUN_COLD)
			await_move(&vm);
		status = live(&vm);
	}
	control_stop(&vm);
	move_source_free(&vm);
	move_forced_free(&vm);
	vm_release(&vm);
	return status;
}

static int run_pairing(const struct host_config *cfg)
{
	struct error err = ERROR_INIT;
	/* Whatever the other side does and wherever this hangs: it is over after that. */
	alarm(2 * PAIR_TIMEOUT_MS / 1000);
	fcntl(CONNECTION_FD, F_SETFD, FD_CLOEXEC);
	fcntl(DAEMON_FD, F_SETFD, FD_CLOEXEC);
	struct jsonl *daemon = jsonl_from_fd(DAEMON_FD);
	int rc = daemon ? pair_serve(cfg, CONNECTION_FD, daemon, &err) : error_errno(&err, ENOMEM, "pairing");
	if (rc < 0)
		log_warn("pairing: %s", err.message);
	jsonl_close(daemon);
	return rc < 0 ? 1 : 0;
}

static int run_incoming(const struct host_config *cfg, bool paired)
{
	struct vm vm;
	struct error err = ERROR_INIT;
	bool became_owner;
	vm_init(&vm, cfg);
	fcntl(CONNECTION_FD, F_SETFD, FD_CLOEXEC);
	fcntl(DAEMON_FD, F_SETFD, FD_CLOEXEC);
	struct jsonl *daemon = jsonl_from_fd(DAEMON_FD);
	if (!daemon) {
		log_error("out of memory");
		return 1;
	}
	int status = 0;
	int rc = terminate_watch(&vm, &err);
	if (rc) {
		log_error("%s", err.message);
		return 1;
	}
	rc = move_destination_serve(&vm, CONNECTION_FD, daemon, paired, &became_owner, &err);
	if (rc)
		log_warn("%s", err.message);
	if (became_owner) {
		status = live(&vm);
		move_destination_leave(&vm, status);
	} else {
		status = rc ? 1 : 0;
	}
	control_stop(&vm);
	move_source_free(&vm);
	move_forced_free(&vm);
	move_destination_free(&vm);
	vm_release(&vm);
	jsonl_close(daemon);
	return status;
}

/* The last line on standard error says what is wrong. */
static int check_image(const char *folder, const char *image, const char *const *below, unsigned nbelow)
{
	struct error err = ERROR_INIT;
	struct block *blk = NULL;
	struct block_open_options opt = {.format = BLOCK_FORMAT_QCOW2,
					 .read_only = true,
					 .run_dir = folder,
					 .backing = below,
					 .nbacking = nbelow};
	if (block_open(image, &opt, &blk, &err)) {
		fprintf(stderr, "%s\n", err.message);
		return EXIT_REFUSED;
	}
	block_close(blk);
	return 0;
}

static int describe_cpu(void)
{
	struct error err = ERROR_INIT;
	json_t *cpu = machine_cpu_describe_host(&err);
	if (!cpu) {
		log_error("%s", err.message);
		return EXIT_REFUSED;
	}
	json_dumpf(cpu, stdout, JSON_COMPACT);
	putchar('\n');
	json_decref(cpu);
	return fflush(stdout) ? EXIT_FAILED : 0;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {{"config", required_argument, NULL, 'c'},
						{"vm", required_argument, NULL, 'v'},
						{"incoming", no_argument, NULL, 'i'},
						{"paused", no_argument, NULL, 'p'},
						{"paired", no_argument, NULL, 'P'},
						{"pair", no_argument, NULL, 'a'},
						{"forced", no_argument, NULL, 'f'},
						{"check-image", required_argument, NULL, 'k'},
						{"cold", no_argument, NULL, 'o'},
						{"describe-cpu", no_argument, NULL, 'd'},
						{"help", no_argument, NULL, 'h'},
						{"version", no_argument, NULL, 'V'},
						{0}};
	const char *config = NULL, *name = NULL, *check_in = NULL;
	bool incoming = false, paired = false, pair = false, cpu = false;
	enum run_how how = RUN;
	int c;
	log_init("snvmm");
	signal(SIGPIPE, SIG_IGN);
	terminate_block();
	/* before there are threads: the first object would open /dev/urandom */
	json_object_seed(0);
	struct error confined = ERROR_INIT;
	if (confine_enable(&confined))
		log_warn("threads run without filters: %s", confined.message);
	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (c) {
		case 'c':
			config = optarg;
			break;
		case 'v':
			name = optarg;
			break;
		case 'i':
			incoming = true;
			break;
		case 'P':
			paired = true;
			break;
		case 'a':
			pair = true;
			break;
		case 'p':
			how = RUN_PAUSED;
			break;
		case 'f':
			how = RUN_FORCED;
			break;
		case 'o':
			how = RUN_COLD;
			break;
		case 'k':
			check_in = optarg;
			break;
		case 'd':
			cpu = true;
			break;
		case 'h':
			usage(stdout);
			return 0;
		case 'V':
			printf("snvmm %s\n", SNM_VERSION);
			return 0;
		default:
			usage(stderr);
			return EXIT_USAGE;
		}
	}
	if (!pair && confine_thread(CONFINE_PROCESS, &confined))
		log_warn("%s", confined.message);
	if (cpu && argc == 2)
		return describe_cpu();
	if (config && check_in && !name && !incoming && optind < argc)
		return check_image(check_in, argv[optind], (const char *const *)&argv[optind + 1],
				   (unsigned)(argc - optind - 1));
	if (!config || cpu || check_in || !!name + incoming + pair != 1 || (paired && !incoming) ||
	    optind != argc) {
		usage(stderr);
		return EXIT_USAGE;
	}
	struct error err = ERROR_INIT;
	struct host_config *cfg = NULL;
	if (host_config_load(config, &cfg, &err)) {
		log_error("%s", err.message);
		return EXIT_REFUSED;
	}
	log_set_subject(name ? name : pair ? "pairing" : "arrival");
	int status = pair ? run_pairing(cfg) : incoming ? run_incoming(cfg, paired) : run_vm(cfg, name, how);
	host_config_free(cfg);
	return status;
}
