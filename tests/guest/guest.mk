# SPDX-License-Identifier: Apache-2.0
# The native test guest and the tool that checks its disks. Included by the Makefile at the root; works alone too:
# make -f tests/guest/guest.mk build/guest/native.elf

B ?= build
ifndef say
say = $(if $(filter 1,$(V)),,@printf '  %-7s %s\n' '$(1)' '$(2)';)
endif
GUEST_CC ?= $(CC)
# The FS base, MXCSR and xmm15 are canaries of the guest's own: no stack protector, xmm15 fixed.
GUEST_CFLAGS := -std=gnu17 -O2 -g -ffreestanding -fno-builtin -nostdlib -fno-pic -fno-pie -mcmodel=small -mno-red-zone \
	-m64 -march=x86-64 -mno-mmx -ffixed-xmm15 -fno-stack-protector -fcf-protection=none \
	-fno-asynchronous-unwind-tables -fno-unwind-tables -fno-tree-loop-distribute-patterns -ftree-vectorize \
	-fno-omit-frame-pointer -Wall -Wextra -Wshadow -Wmissing-prototypes -Wstrict-prototypes -Wvla -Wundef -Werror
GUEST_SOURCES := console.c diskwork.c main.c memwork.c pci.c platform.c spare.c virtio.c virtio_blk.c
GUEST_OBJECTS := $(GUEST_SOURCES:%.c=$(B)/guest/%.o) $(B)/guest/entry.o

TEST_HELPERS += $(B)/guest/native.elf $(B)/tests/guest/check_disk

.PHONY: guest
guest: $(B)/guest/native.elf $(B)/tests/guest/check_disk

$(B)/guest/%.o: tests/guest/%.c tests/guest/guest.mk
	$(call say,GCC,$@) mkdir -p $(@D); $(GUEST_CC) $(GUEST_CFLAGS) -MMD -MP -c -o $@ $<

$(B)/guest/%.o: tests/guest/%.S tests/guest/guest.mk
	$(call say,GAS,$@) mkdir -p $(@D); $(GUEST_CC) -m64 -g -MMD -MP -c -o $@ $<

$(B)/guest/native.elf: $(GUEST_OBJECTS) tests/guest/native.lds
	$(call say,GLD,$@) $(GUEST_CC) -m64 -static -nostdlib -no-pie -Wl,--build-id=none -Wl,-n \
		-Wl,-z,noexecstack -Wl,--no-warn-rwx-segments -T tests/guest/native.lds -o $@ $(GUEST_OBJECTS)

$(B)/tests/guest/check_disk: tests/guest/check_disk.c tests/guest/selfdesc.h
	$(call say,CC,$@) mkdir -p $(@D); $(CC) -std=c17 -D_GNU_SOURCE -O2 -g -Wall -Wextra -Wshadow -Wmissing-prototypes \
		-Wformat=2 -Wstrict-prototypes -Wvla -Wundef -Werror -o $@ $<

-include $(GUEST_OBJECTS:.o=.d)
