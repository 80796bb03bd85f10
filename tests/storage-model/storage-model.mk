# SPDX-License-Identifier: Apache-2.0
# A random guest against mirror, NBD and real disks. Ten seeds belong to mirror's unit tests;
#   make storage-model SEEDS=200 [FIRST=n]   more of them
#   make storage-model-asan, storage-model-tsan   the same under the sanitizers
SEEDS ?= 200
FIRST ?= 1
STORAGE_MODEL := $(B)/tests/storage-model/storage_model
TESTS_mirror += $(STORAGE_MODEL)
unit-mirror: $(STORAGE_MODEL)

$(STORAGE_MODEL): $(patsubst %.c,$(B)/%.o,$(wildcard tests/storage-model/*.c)) $(LINK_mirror:%=$(B)/lib%.a)
	$(call say,LD,$@) $(CC) -o $@ $(filter %.o,$^) -Wl,--start-group $(filter %.a,$^) -Wl,--end-group $(LDFLAGS_ALL) $(LIBS_ALL) $(CHECK_LIBS)

.PHONY: storage-model storage-model-asan storage-model-tsan
storage-model: $(STORAGE_MODEL)
	$(Q)SNM_STORAGE_SEEDS=$(SEEDS) SNM_STORAGE_FIRST=$(FIRST) $(STORAGE_MODEL)
storage-model-asan:
	$(Q)$(MAKE) --no-print-directory B=build-asan SAN=address,undefined storage-model
storage-model-tsan:
	$(Q)TSAN_OPTIONS="suppressions=$(CURDIR)/tests/tsan.supp" $(MAKE) --no-print-directory B=build-tsan SAN=thread storage-model
