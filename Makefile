# SPDX-License-Identifier: Apache-2.0
# Targets: all check unit unit-MOD unit-confined system interop asan tsan valgrind model fuzz soak kill-matrix storage-model storage-faults memory-faults operation bench bench-storage bench-memory man format install deb package-test clean
# Variables: V=1 (show commands), B=build (build directory), SAN=address,undefined|thread, WERROR=1, PREFIX, DESTDIR

B ?= build
PREFIX ?= /usr/local
CC ?= gcc
V ?= 0
Q := $(if $(filter 1,$(V)),,@)
say = $(if $(filter 1,$(V)),,@printf '  %-7s %s\n' '$(1)' '$(2)';)

MODULES := base net block nbd mirror memxfer host vmm tui
PKGS := libnbd libzstd openssl jansson libxxhash liburing libmnl libsystemd sqlite3 libseccomp libcap-ng
ifeq ($(filter clean format,$(MAKECMDGOALS)),)
MISSING_PKGS := $(shell for p in $(PKGS) ncursesw check; do pkg-config --exists $$p || echo $$p; done)
ifneq ($(strip $(MISSING_PKGS)),)
$(error missing development packages: $(MISSING_PKGS). Run tools/setup, or tools/setup --print for the list)
endif
endif
PKG_CFLAGS := $(shell pkg-config --cflags $(PKGS) 2>/dev/null)
PKG_LIBS := $(shell pkg-config --libs $(PKGS) 2>/dev/null)
TUI_LIBS := $(shell pkg-config --libs ncursesw 2>/dev/null)
CHECK_LIBS := $(shell pkg-config --libs check 2>/dev/null)

VERSION := $(shell cat VERSION)
WARN := -Wall -Wextra -Wshadow -Wmissing-prototypes -Wstrict-prototypes -Wformat=2 -Wvla -Wundef -Wno-unused-parameter -Wno-missing-field-initializers -Wno-format-truncation
OPT ?= -O2 -g
CFLAGS_ALL := -std=c17 -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -DSNM_VERSION='"$(VERSION)"' -I. $(WARN) \
	$(if $(filter 0,$(WERROR)),,-Werror) $(OPT) -fno-strict-aliasing -fstack-protector-strong -pthread $(PKG_CFLAGS) \
	$(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer,) $(CFLAGS)
LDFLAGS_ALL := -pthread $(if $(SAN),-fsanitize=$(SAN),) $(LDFLAGS)
LIBS_ALL := $(PKG_LIBS) -lm

# What a module may use: the arrows of docs/design.md. A unit test links with its module and these alone,
# so a forbidden arrow is a link error.
USES_base :=
USES_net := base
USES_host := base net
USES_block := base net
USES_nbd := base net block
USES_mirror := base block
USES_memxfer := base net
USES_tui := base
USES_vmm := base net block nbd mirror memxfer host
# block's NBD driver and the NBD client need one another (block drives remote images through nbd's client)
LINK_block := block nbd net base
LINK_nbd := nbd block net base
LINK_mirror := mirror block nbd net base
LINK_base := base
LINK_net := net base
LINK_host := host net base
LINK_memxfer := memxfer net base
LINK_tui := tui base
LINK_vmm := vmm mirror memxfer nbd block host net base

define module
SRC_$(1) := $$(wildcard $(1)/*.c)
OBJ_$(1) := $$(SRC_$(1):%.c=$$(B)/%.o)
$$(B)/lib$(1).a: $$(OBJ_$(1))
	$$(call say,AR,$$@) rm -f $$@; ar rcs $$@ $$^
TESTS_$(1) := $$(patsubst %.c,$$(B)/%,$$(wildcard tests/unit/$(1)/test_*.c))
$$(TESTS_$(1)): $$(B)/tests/unit/$(1)/%: $$(B)/tests/unit/$(1)/%.o $$(B)/tests/unit/confined.o $$(LINK_$(1):%=$$(B)/lib%.a)
	$$(call say,LD,$$@) $$(CC) -o $$@ $$(filter %.o,$$^) -Wl,--start-group $$(LINK_$(1):%=$$(B)/lib%.a) -Wl,--end-group $$(LDFLAGS_ALL) $$(LIBS_ALL) $$(CHECK_LIBS)
.PHONY: unit-$(1)
unit-$(1): $$(TESTS_$(1))
	$$(Q)tests/run-unit $$(TESTS_$(1))
endef

PROGRAMS := $(patsubst tools/%.c,$(B)/bin/%,$(wildcard tools/*.c))
LIBFILES := $(MODULES:%=$(B)/lib%.a)
ALL_LINK := $(LINK_vmm)

.PHONY: all
all: $(PROGRAMS)
# the first rule above is the default; module rules follow
$(foreach m,$(MODULES),$(eval $(call module,$(m))))

# subcommand files of a program: tools/libNAME/*.c
define program
SUB_$(1) := $$(patsubst %.c,$$(B)/%.o,$$(wildcard tools/lib$(1)/*.c))
$$(B)/bin/$(1): $$(B)/tools/$(1).o $$(SUB_$(1)) $$(PROG_LINK_$(1):%=$$(B)/lib%.a)
	$$(call say,LD,$$@) mkdir -p $$(@D); $$(CC) -o $$@ $$(filter %.o,$$^) -Wl,--start-group $$(PROG_LINK_$(1):%=$$(B)/lib%.a) -Wl,--end-group $$(LDFLAGS_ALL) $$(LIBS_ALL) $$(LIBS_$(1))
endef
PROG_LINK_snvmm := $(LINK_vmm)
PROG_LINK_snmigrated := host net base
PROG_LINK_snmigrate := tui host net base
LIBS_snmigrate := $(TUI_LIBS)
PROG_LINK_snvm := host net base
PROG_LINK_snnbd := nbd block net base
$(foreach p,$(patsubst tools/%.c,%,$(wildcard tools/*.c)),$(eval $(call program,$(p))))

$(B)/%.o: %.c VERSION
	$(call say,CC,$<) mkdir -p $(@D); $(CC) $(CFLAGS_ALL) -MMD -MP -c -o $@ $<

-include tests/guest/guest.mk
-include tests/helpers/helpers.mk
-include tests/fuzz/fuzz.mk
-include tests/storage-model/storage-model.mk
-include bench/bench.mk

MANPAGES := $(patsubst docs/man/%.scd,$(B)/man/%,$(wildcard docs/man/*.scd))
$(MANPAGES): $(B)/man/%: docs/man/%.scd
	$(call say,MAN,$@) mkdir -p $(@D); scdoc <$< >$@.tmp && mv $@.tmp $@

ALL_TESTS := $(foreach m,$(MODULES),$(TESTS_$(m)))
.PHONY: storage-faults memory-faults operation tests unit unit-confined system interop check model asan tsan valgrind format install clean kill-matrix soak man install-man deb package-test
man: $(MANPAGES)
tests: $(ALL_TESTS) $(TEST_HELPERS)
# What runs in a snvmm has each thread under its filter, as there; sanitizers make calls of their own.
CONFINED := net block nbd mirror memxfer vmm
unit: $(ALL_TESTS)
	$(Q)rc=0; tests/run-unit $(foreach m,$(filter-out $(CONFINED),$(MODULES)),$(TESTS_$(m))) || rc=1; \
	$(MAKE) --no-print-directory unit-confined || rc=1; exit $$rc
unit-confined: $(foreach m,$(CONFINED),$(TESTS_$(m)))
	$(Q)$(if $(SAN),,SNM_CONFINED=1) tests/run-unit $^
system: all tests
	$(Q)tests/run-scripts tests/system
interop: all tests
	$(Q)tests/run-scripts tests/interop
model:
	$(Q)tests/model/run
check: all tests
	$(Q)tests/run-all
asan:
	$(Q)$(MAKE) --no-print-directory B=build-asan SAN=address,undefined unit
tsan:
	$(Q)TSAN_OPTIONS="suppressions=$(CURDIR)/tests/tsan.supp" $(MAKE) --no-print-directory B=build-tsan SAN=thread unit
valgrind: $(ALL_TESTS)
	$(Q)SNM_NO_IO_URING=1 SNM_MODEL_SEEDS=20 SNM_STORAGE_SEEDS=3 SNM_WRAP="valgrind -q --error-exitcode=99 --leak-check=full --errors-for-leak-kinds=definite --child-silent-after-fork=yes --suppressions=tests/valgrind.supp" tests/run-unit $(ALL_TESTS)
# ten moves back and forth of the Linux guest after the first, a hundred of the native one
SOAK_MOVES ?= 100
soak: all tests
	tests/system/lab_smoke.sh
	SNM_VERIFY=1 MOVES=11 tests/system/linux_moves.sh
	SNM_VERIFY=1 MOVES=$(SOAK_MOVES) tests/system/native_moves.sh
# every case of what the check runs in part: flipped bits, cut links, kills and resumes
storage-faults: all tests
	$(Q)for t in bit_flips link_cut kill_resume disks_shape mirror_buffered sixteen_disks; do tests/run-scripts tests/system/$$t.sh || exit 1; done
# every case of post-copy, cut at 10, 50 and 90 % among them, and of a guest that dirties faster than the link carries
memory-faults: all tests
	$(Q)for t in postcopy convergence deltas verify balloon; do tests/run-scripts tests/system/$$t.sh || exit 1; done
# what an administrator does with many hosts, with every fault
operation: all tests
	$(Q)for t in evacuate evacuate_faults evacuate_examples renewal journal migration_network quick baseline unprivileged lab_evacuation; do tests/run-scripts tests/system/$$t.sh || exit 1; done
kill-matrix: all tests
	$(Q)tests/kill-matrix
format:
	$(Q)git ls-files '*.c' '*.h' | xargs clang-format -i
install: all
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/doc/snmigrate
	install -m 0755 $(PROGRAMS) $(DESTDIR)$(PREFIX)/bin
	install -m 0644 README.md LICENSE docs/*.md $(DESTDIR)$(PREFIX)/share/doc/snmigrate
	install -d $(DESTDIR)$(PREFIX)/share/doc/snmigrate/examples
	install -m 0755 examples/*.sh $(DESTDIR)$(PREFIX)/share/doc/snmigrate/examples
	install -m 0644 examples/*.service examples/*.conf $(DESTDIR)$(PREFIX)/share/doc/snmigrate/examples
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	install -m 0644 tools/completion/snmigrate.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/snmigrate
	ln -sf snmigrate $(DESTDIR)$(PREFIX)/share/bash-completion/completions/snvm
	@if command -v scdoc >/dev/null; then $(MAKE) --no-print-directory install-man; else echo "scdoc is not installed: no man pages"; fi
install-man: $(MANPAGES)
	for n in 1 5 8; do install -d $(DESTDIR)$(PREFIX)/share/man/man$$n && install -m 0644 $(B)/man/*.$$n $(DESTDIR)$(PREFIX)/share/man/man$$n; done
deb:
	$(Q)tools/deb/build $(B)/deb
package-test: all tests
	$(Q)tests/package/run
clean:
	rm -rf build build-asan build-tsan build-fuzz

-include $(shell find $(B) -name '*.d' 2>/dev/null)
