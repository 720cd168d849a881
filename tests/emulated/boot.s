# First sector of a disk: reads the kernel behind it to 0x10000, enables vectors and tile registers, calls `start`.
.intel_syntax noprefix
.code16
.section .boot, "ax"
.global _boot
_boot:
    cli
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    in al, 0x92                 # addresses above 1 MiB
    or al, 2
    out 0x92, al
    mov cx, 12                  # pieces of 64 sectors
next:
    mov si, OFFSET packet
    mov ah, 0x42
    mov dl, 0x80
    push cx
    int 0x13
    pop cx
    add word ptr [packet + 6], 0x800
    add word ptr [packet + 8], 64
    loop next
    cli
    mov edi, 0x1000             # page tables: the first GiB as it lies
    mov cr3, edi
    xor eax, eax
    mov ecx, 0xc00
    rep stosd
    mov dword ptr [0x1000], 0x2003
    mov dword ptr [0x2000], 0x3003
    mov edi, 0x3000
    mov eax, 0x83
pages:
    mov [edi], eax
    add eax, 0x200000
    add edi, 8
    cmp edi, 0x4000
    jb pages
    lgdt [gdt_place]
    mov eax, cr4
    or eax, 0x40620             # PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
    mov cr4, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100               # long mode
    wrmsr
    mov eax, cr0
    or eax, 0x80000003
    and eax, 0xfffffffb
    mov cr0, eax
    ljmp 8, OFFSET long_mode
packet:
    .word 16, 64, 0, 0x1000
    .quad 1
gdt:
    .quad 0, 0x00209a0000000000, 0x0000920000000000
gdt_place:
    .word 23
    .long gdt
.code64
long_mode:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov rsp, 0x1000000
    mov eax, 0x600e7            # x87, SSE, AVX, AVX-512, tile shapes and data
    xor edx, edx
    xor ecx, ecx
    xsetbv
    call start
stop:
    hlt
    jmp stop
    .org 510
    .word 0xaa55
.section .note.GNU-stack, "", @progbits
