"""Taking rights away from this process, for good and without being root: Linux's seccomp, Landlock and rlimits.

`confine` leaves a process with one thread group that cannot start another, has no network, signals nobody else, writes
files in one folder and reads those that Python needs. Landlock needs Linux 5.13 or newer; without it no file can be
opened for writing, and reading is not limited. Mode bits, owners and times of files can never be changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys

from .syscalls import ALLOWED, CONDITIONAL, WRITING, Number

NOBODY = 65534
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 22, 38
CAP_DAC_READ_SEARCH = 1 << 2
CLONE_THREAD, CLONE_NEWNS, CLONE_NEWUSER = 0x10000, 0x20000, 0x10000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # seccomp's name, column of the numbers
READ_FILE, READ_FOLDER = 1 << 2, 1 << 3  # Landlock's rights
LANDLOCK_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # rights that each version knows
LANDLOCK_NEWEST = 3  # of the versions whose rights are asked for
READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/random", "/dev/zero")

libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments) -> int:
    """A function of libc; OSError where it fails."""
    found = getattr(libc, name)(*arguments)
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return found


def _prctl(option: int, value: int, pointer: ctypes.Array | None = None) -> None:
    _call("prctl", option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0))


def obstacle() -> str | None:
    """Why processes cannot be confined here, or None."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return f"it needs Linux on {' or '.join(ARCHITECTURES)}, and this is {sys.platform} on {platform.machine()}"
    try:
        _prctl(PR_SET_SECCOMP, 2)  # a filter that is missing: EFAULT where filters are supported
    except OSError as error:
        if error.errno != errno.EFAULT:
            return f"the kernel has no seccomp filters ({error})"
    return None


def private_folder(folder: str, num_bytes: int, num_files: int) -> bool:
    """Put a file system of limited size, in memory, over `folder`; False where the kernel does not let us."""

    def mount() -> None:
        uid, gid, is_root = os.getuid(), os.getgid(), os.geteuid() == 0
        _call("unshare", CLONE_NEWNS if is_root else CLONE_NEWUSER | CLONE_NEWNS)
        if not is_root:
            for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(line)
        _call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
        options = f"size={num_bytes},nr_inodes={num_files},mode=0755".encode()
        _call("mount", b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)

    child = os.fork()  # what fails half way would stay with the process that tried
    if child == 0:
        with contextlib.suppress(BaseException):
            mount()
            os._exit(0)
        os._exit(1)
    if os.waitpid(child, 0)[1] == 0:
        mount()
        return True
    return False


def hide_memory() -> None:
    """No other process of the same user can read this one's memory or environment."""
    _prctl(PR_SET_DUMPABLE, 0)


def limit(*, seconds: int, memory: int, file_size: int, open_files: int, threads: int) -> None:
    """Limits of the process: CPU seconds, address space and largest file in bytes, numbers of files and threads."""
    wanted = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_NPROC: threads + _num_tasks(NOBODY if os.geteuid() == 0 else os.geteuid()),
        resource.RLIMIT_CORE: 0,
    }
    for name, value in wanted.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def _num_tasks(uid: int) -> int:
    """Threads that the user has already: the limit counts them."""
    found = 0
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):  # processes that end meanwhile
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                found += len(os.listdir(f"/proc/{entry.name}/task"))
    return found


def confine(folder: str, parent: int) -> None:
    """Give up every right but those to compute, and to read and write in `folder`. Ends with the process `parent`."""
    if os.geteuid() == 0:
        _drop_root()
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    files_are_limited = _limit_files(folder)
    _prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)
    _filter_syscalls(allow_writing=files_are_limited)


def _drop_root() -> None:
    """Become nobody, who can still read what root can: limits of threads do not hold for root."""
    with contextlib.suppress(OSError):
        _prctl(PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    kept = CAP_DAC_READ_SEARCH if os.geteuid() == NOBODY else 0
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    for effective in (kept, 0):  # nothing at all where that one is not ours to keep
        with contextlib.suppress(OSError):
            data = struct.pack("=6I", effective, effective, 0, 0, 0, 0)
            _call("capset", header, ctypes.create_string_buffer(data))
            break
    try:
        os.scandir(os.path.dirname(os.__file__)).close()
    except OSError as error:  # every import of a program would fail
        raise PermissionError(
            f"{error}: programs run as nobody, who cannot read Python there. Install it outside of root's home, start "
            "the container with --cap-add DAC_READ_SEARCH, or train as another user than root"
        ) from error


def _limit_files(folder: str) -> bool:
    """Landlock: read what Python needs, write in `folder`; False where the kernel has none."""
    try:
        version = _call("syscall", 444, None, ctypes.c_size_t(0), 1)
    except OSError:
        return False
    handled = LANDLOCK_FILES[min(version, LANDLOCK_NEWEST)]
    attributes = ctypes.create_string_buffer(struct.pack("=Q", handled))
    ruleset = _call("syscall", 444, attributes, ctypes.c_size_t(8), 0)
    paths = dict.fromkeys((*READABLE, sys.prefix, sys.base_prefix), READ_FILE | READ_FOLDER)
    paths |= {os.devnull: READ_FILE | 1 << 1, folder: handled & ~1}  # 1 << 1: write, 1: execute
    for path, rights in paths.items():
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            rights &= ~READ_FOLDER
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights & handled, fd))
        _call("syscall", 445, ruleset, 1, rule, 0)
        os.close(fd)
    _call("syscall", 446, ruleset, 0)
    os.close(ruleset)
    return True


# seccomp: a filter in Berkeley's packet language, one block per system call, each of which ends in an answer

LOAD, IS, HAS, RETURN = 0x20, 0x15, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16  # offsets of what is judged
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000


def _filter_syscalls(*, allow_writing: bool) -> None:
    code = build_filter(platform.machine(), os.getpid(), allow_writing=allow_writing)
    instructions = ctypes.create_string_buffer(code, len(code))
    size = struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions))
    _prctl(PR_SET_SECCOMP, 2, ctypes.create_string_buffer(size, len(size)))


def build_filter(machine: str, pid: int, *, allow_writing: bool) -> bytes:
    """The filter of a process `pid`, 8 bytes per instruction. Calls that are not allowed fail with EPERM."""
    name, column = ARCHITECTURES[machine]
    code = [(LOAD, 0, 0, ARCHITECTURE), (IS, 1, 0, name), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]

    def answer(number: Number, *block: tuple[int, int, int, int]) -> None:
        if (value := number[column]) is not None:
            code.extend([(IS, 0, len(block), value), *block])

    for call, number in ALLOWED.items():
        if call in WRITING and not allow_writing:
            continue
        answer(number, (RETURN, 0, 0, ALLOW))
    no, yes = (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)
    for call, number in CONDITIONAL.items():
        if call == "clone":  # threads, no processes
            answer(number, (LOAD, 0, 0, ARGUMENT), (HAS, 0, 1, CLONE_THREAD), yes, no)
        elif call == "clone3":  # its flags cannot be read; libc then takes clone
            answer(number, (RETURN, 0, 0, 0x00050000 | errno.ENOSYS))
        elif call in ("kill", "tgkill", "prlimit64"):  # itself
            answer(number, (LOAD, 0, 0, ARGUMENT), (IS, 1, 0, pid), (IS, 0, 1, 0 if call == "prlimit64" else pid),
                   yes, no)  # fmt: skip
        elif call == "sendto":  # no address
            low, high = ARGUMENT + 8 * 4, ARGUMENT + 8 * 4 + 4
            answer(number, (LOAD, 0, 0, low), (IS, 0, 3, 0), (LOAD, 0, 0, high), (IS, 0, 1, 0), yes, no)
        else:  # open, openat: flags
            place = ARGUMENT + 8 * (1 if call == "open" else 2)
            flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            block = [(LOAD, 0, 0, place), (HAS, 1, 0, flags), yes, no]
            answer(number, *([yes] if allow_writing else block))
    code.append(no)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
