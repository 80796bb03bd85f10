/* SPDX-License-Identifier: Apache-2.0 */
/*
 * PVH entry of the native test guest.
 *
 * Ring 0 does as little as it can: on a host that emulates guest kernel mode every instruction here is slow, and the
 * emulator knows few of them. The page tables for the first 4 GiB are therefore data, not code; everything else (IDT,
 * mappings above 4 GiB) is filled in by ring 3, which may write all of memory.
 */
#define KERNEL_CS 0x10
#define KERNEL_DS 0x18
#define USER_DS (0x28 | 3)
#define USER_CS (0x30 | 3)
#define USER_RFLAGS 0x3002 /* IOPL 3 */
#define TSS_SEL 0x40
#define MSR_EFER 0xc0000080
#define MSR_FS_BASE 0xc0000100
/* Present, writable, user, accessed, dirty. */
#define PTE_TABLE 0x27
#define PTE_LARGE 0xe7

	.section .note.Xen, "a", @note
	.balign 4
	.long 4				/* namesz: "Xen\0" */
	.long 8				/* descsz */
	.long 18			/* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.balign 4
	.quad guest_entry32
	.balign 4

	.section .text.entry, "ax"
	.code32
	.globl guest_entry32
guest_entry32:
	cld
	movl $ring0_stack_top, %esp
	movl %ebx, start_info_address

	/* TSS descriptor: its base is scattered over the entry, which no relocation can express. */
	movl $guest_tss, %eax
	movw %ax, gdt + TSS_SEL + 2
	shrl $16, %eax
	movb %al, gdt + TSS_SEL + 4
	movb %ah, gdt + TSS_SEL + 7

	movl %cr4, %eax
	orl $0x620, %eax		/* PAE, OSFXSR, OSXMMEXCPT */
	movl %eax, %cr4
	movl $page_table_pml4, %eax
	movl %eax, %cr3
	movl $MSR_EFER, %ecx
	rdmsr
	orl $0x100, %eax		/* LME */
	wrmsr
	movl %cr0, %eax
	andl $0x9ffffff3, %eax		/* CD, NW, TS and EM off */
	orl $0x80000023, %eax		/* PG, NE, MP, PE */
	movl %eax, %cr0
	lgdt gdt_pointer
	ljmp $KERNEL_CS, $entry64

	.code64
entry64:
	movl $KERNEL_DS, %eax
	movl %eax, %ss
	movl $ring0_stack_top, %esp
	lidt idt_pointer
	movl $TSS_SEL, %eax
	ltr %ax
	movl $USER_DS, %eax
	movl %eax, %ds
	movl %eax, %es
	xorl %eax, %eax
	movl %eax, %fs
	movl %eax, %gs
	movl $MSR_FS_BASE, %ecx
	movl $fs_area, %eax
	xorl %edx, %edx
	wrmsr
	/*
	 * Ports from ring 3 are allowed twice. Where a KVM emulates ring 0, IOPL does not survive the iretq and the TSS's bitmap
	 * counts. QEMU's emulated AMD-V does not honour the bitmap of a TSS that is marked busy, as every TR is that KVM_SET_SREGS
	 * has loaded; there IOPL counts.
	 */
	pushq $USER_DS
	pushq $ring3_stack_top
	pushq $USER_RFLAGS
	pushq $USER_CS
	pushq $ring3_entry
	iretq

ring3_entry:
	xorl %ebp, %ebp
	movl start_info_address, %edi
	call guest_main
1:	pause
	jmp 1b

	/*
	 * Exceptions: hand vector, error code, rip and cr2 to guest_fault() in ring 3 and never come back. The stubs are 16
	 * bytes apart, so that ring 3 can compute their addresses when it fills the IDT.
	 */
	.balign 16
	.globl fault_stubs
fault_stubs:
	.set vector, 0
	.rept 32
	.balign 16
	.if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
	pushq $0
	.endif
	pushq $vector
	jmp fault_common
	.set vector, vector + 1
	.endr

	.balign 16
fault_common:
	popq %rdi
	popq %rsi
	popq %rdx
	movq %cr2, %rcx
	movl $ring0_stack_top, %esp
	pushq $USER_DS
	pushq $fault_stack_top
	pushq $USER_RFLAGS
	pushq $USER_CS
	pushq $fault_ring3
	iretq
fault_ring3:
	call guest_fault
1:	pause
	jmp 1b

	/*
	 * idle=1: ring 3 halts by an invalid instruction, as a KVM that emulates ring 0 need not know `int`; this gate takes the place
	 * of its handler. Interrupts are on during that halt and nowhere else. Whatever ends it arrives at interrupt_gate, which drops
	 * its own frame and returns to ring 3: no return from ring 0 to ring 0 either.
	 */
	.globl idle_wait
idle_wait:
idle_instruction:
	ud2
	ret
	.balign 16
	.globl idle_gate
idle_gate:
	cmpq $idle_instruction, (%rsp)
	jne fault_stubs + 6 * 16
	addq $2, (%rsp)
	sti
	hlt
	cli
	iretq
	.balign 16
	.globl interrupt_gate
interrupt_gate:
	movb $0x20, %al
	outb %al, $0x20			/* end of interrupt */
	movq 24(%rsp), %rsp		/* as it was in idle_gate, ring 3's frame on top */
	iretq

	.section .data
	.balign 16
gdt:
	.quad 0
	.quad 0x00cf9b000000ffff	/* 0x08 kernel code, 32 bit */
	.quad 0x00af9b000000ffff	/* 0x10 kernel code */
	.quad 0x00cf93000000ffff	/* 0x18 kernel data */
	.quad 0x00cffb000000ffff	/* 0x20 user code, 32 bit */
	.quad 0x00cff3000000ffff	/* 0x28 user data */
	.quad 0x00affb000000ffff	/* 0x30 user code */
	.quad 0
	.quad 0x0000890000000000 + (guest_tss_end - guest_tss - 1)	/* 0x40 TSS, base filled in above */
	.quad 0
gdt_end:
gdt_pointer:
	.word gdt_end - gdt - 1
	.quad gdt
	.balign 8
idt_pointer:
	.word 40 * 16 - 1
	.quad guest_idt

	.balign 16
guest_tss:
	.long 0
	.quad ring0_stack_top		/* rsp0 */
	.skip 90
	.word guest_io_bitmap - guest_tss
guest_io_bitmap:
	.skip 8192, 0			/* every port allowed */
	.byte 0xff
guest_tss_end:
	.if (guest_io_bitmap - guest_tss) != 104
	.error "TSS layout"
	.endif

	.balign 4096
	.globl page_table_pml4
page_table_pml4:
	.quad page_table_pdpt + PTE_TABLE
	.skip 4096 - 8
	.globl page_table_pdpt
page_table_pdpt:
	.quad page_table_pd + PTE_TABLE
	.quad page_table_pd + 0x1000 + PTE_TABLE
	.quad page_table_pd + 0x2000 + PTE_TABLE
	.quad page_table_pd + 0x3000 + PTE_TABLE
	.skip 4096 - 32
page_table_pd:
	.set index, 0
	.rept 2048
	.quad index * 0x200000 + PTE_LARGE
	.set index, index + 1
	.endr

	.section .bss
	.balign 16
	.globl guest_idt
guest_idt:
	.skip 40 * 16
	.globl fs_area
fs_area:
	.skip 64
start_info_address:
	.skip 16
	.skip 4096
ring0_stack_top:
	.skip 4096
fault_stack_top:
	.skip 65536
ring3_stack_top:
	.section .note.GNU-stack, "", @progbits
