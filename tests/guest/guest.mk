# SPDX-License-Identifier: Apache-2.0
# The native test guest and the tool that checks its disks. Included by the Makefile at the root; works alone too:
# make -f tests/guest/guest.mk build/guest/native.elf

BUILD ?= build
GUEST_CC ?= $(CC)
# The FS base, MXCSR and xmm15 are canaries of the guest's own: no stack protector, xmm15 fixed.
GUEST_CFLAGS := -std=gnu17 -O2 -g -ffreestanding -fno-builtin -nostdlib -fno-pic -fno-pie -mcmodel=small -mno-red-zone \
	-m64 -march=x86-64 -mno-mmx -ffixed-xmm15 -fno-stack-protector -fcf-protection=none \
	-fno-asynchronous-unwind-tables -fno-unwind-tables -fno-tree-loop-distribute-patterns -ftree-vectorize \
	-fno-omit-frame-pointer -Wall -Wextra -Wshadow -Wmissing-prototypes -Wstrict-prototypes -Wvla -Wundef -Werror
GUEST_SOURCES := console.c diskwork.c main.c memwork.c pci.c platform.c virtio_blk.c
GUEST_OBJECTS := $(GUEST_SOURCES:%.c=$(BUILD)/guest/%.o) $(BUILD)/guest/entry.o

.PHONY: guest
guest: $(BUILD)/guest/native.elf $(BUILD)/tests/guest/check_disk

$(BUILD)/guest/%.o: tests/guest/%.c tests/guest/guest.mk
	@mkdir -p $(@D)
	$(if $(V),,@echo "  GUESTCC $@";) $(GUEST_CC) $(GUEST_CFLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/guest/%.o: tests/guest/%.S tests/guest/guest.mk
	@mkdir -p $(@D)
	$(if $(V),,@echo "  GUESTAS $@";) $(GUEST_CC) -m64 -g -MMD -MP -c -o $@ $<

$(BUILD)/guest/native.elf: $(GUEST_OBJECTS) tests/guest/native.lds
	$(if $(V),,@echo "  GUESTLD $@";) $(GUEST_CC) -m64 -static -nostdlib -no-pie -Wl,--build-id=none -Wl,-n \
		-Wl,-z,noexecstack -Wl,--no-warn-rwx-segments -T tests/guest/native.lds -o $@ $(GUEST_OBJECTS)

$(BUILD)/tests/guest/check_disk: tests/guest/check_disk.c tests/guest/selfdesc.h
	@mkdir -p $(@D)
	$(if $(V),,@echo "  CC      $@";) $(CC) -std=c17 -D_GNU_SOURCE -O2 -g -Wall -Wextra -Wshadow -Wmissing-prototypes \
		-Wformat=2 -Wstrict-prototypes -Wvla -Wundef -Werror -o $@ $<

-include $(GUEST_OBJECTS:.o=.d)
