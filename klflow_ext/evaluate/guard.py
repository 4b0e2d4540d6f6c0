"""What the sandbox starts: it shuts the process in, runs the program, and ends with it. Only the standard library, run by its path.

guard         started by sandbox.py; makes the namespaces and waits; SIGTERM ends what it started
init          process 1 of the pid namespace: when it ends, the kernel kills all that is in there
runner        a fresh interpreter, limited and filtered, with nothing of the first ones' memory
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import time

libc = ctypes.CDLL(None, use_errno=True)
NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # mount, ipc, user, pid, net
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
SYS_MOUNT_SETATTR, SYS_LANDLOCK = 442, 444  # the same on all machines, as all new ones are
NOBODY = 65534

# The runner. The token is what passes; it is in no file and no environment, and is written after the last test.
RUNNER = """
def main():
    import os, sys, traceback, types
    with open(int(sys.argv[1]), encoding="utf-8", newline="") as file:
        token, _, source = file.read().partition("\\n")
    result, write, leave = int(sys.argv[2]), os.write, os._exit
    sys.argv = ["program"]
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    code = 0
    try:
        exec(compile(source, "program", "exec"), module.__dict__)
        said = token
    except BaseException as error:
        said, code = type(error).__name__, 1
        try:
            traceback.print_exc()
        except BaseException:
            pass
    try:
        sys.stdout.flush(), sys.stderr.flush()
    except BaseException:
        pass
    write(result, said.encode())
    leave(code)
main()
"""


def check(result, what):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def enter_namespaces():
    """New ones for all but time and names; processes that are forked from now on live in the new pid namespace."""
    user, group = os.geteuid(), os.getegid()
    check(libc.unshare(NEW_NAMESPACES), "unshare")
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{NOBODY} {user} 1")  # not 0, so that the runner's exec drops all capabilities
    write("/proc/self/gid_map", f"{NOBODY} {group} 1")


def close_files(folder, disk):
    """All is read-only but a folder in memory, which goes with the namespace; /proc shows the new processes only."""
    attributes = struct.pack("<QQQQ", 1, 0, 1 << 18, 0)  # read-only and private
    check(libc.syscall(SYS_MOUNT_SETATTR, -100, b"/", 0x8000, attributes, len(attributes)), "mount_setattr")
    check(libc.mount(b"proc", b"/proc", b"proc", 0xF, None), "mount of /proc")
    options = f"size={disk},nr_inodes=4096,mode=700".encode()
    check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0x6, options), "mount of the folder")


def landlock(folder):
    """Nothing is written outside the folder, where the kernel can see to it (Landlock); True if so."""
    version = libc.syscall(SYS_LANDLOCK, None, 0, 1)
    if version < 1:
        return False
    writes = 1 << 1 | 0x1FF << 4 | (1 << 14 if version >= 3 else 0)
    rules = check(libc.syscall(SYS_LANDLOCK, struct.pack("<Q", writes), 8, 0), "landlock")
    for path, allowed in ((folder, writes), ("/dev/null", 1 << 1)):
        number = os.open(path, os.O_PATH)
        check(libc.syscall(SYS_LANDLOCK + 1, rules, 1, struct.pack("<Qi", allowed, number), 0), "landlock")
        os.close(number)
    check(libc.syscall(SYS_LANDLOCK + 2, rules, 0), "landlock")
    os.close(rules)
    return True


def seccomp():
    """No socket, no new process or namespace, no memory that RLIMIT_AS does not count, and no signal, trace or limit of another.

    Each such call fails with EPERM.
    """
    # Architecture; socket, clone; kill, tkill, tgkill, prlimit64, rt_sigqueueinfo; those always refused: fork and vfork,
    # ptrace, process_vm_readv and writev, unshare, setns, memfd_create, shmget.
    calls = {
        "x86_64": (0xC000003E, 41, 56, (62, 200, 234, 302, 129), (57, 58, 101, 310, 311, 272, 308, 319, 29)),
        "aarch64": (0xC00000B7, 198, 220, (129, 130, 131, 261, 138), (117, 270, 271, 97, 268, 279, 194)),
    }
    architecture, socket, clone, to_others, never = calls[platform.machine()]
    own = os.getpid()  # stays the same over exec
    load = lambda at: (0x20, 0, 0, at)  # noqa: E731
    allow, refuse, missing = (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x00050026)
    rows = [load(4), (0x15, 1, 0, architecture), (0x06, 0, 0, 0x80000000), load(0)]
    rows += [(0x35, 0, 1, 0x40000000), refuse]  # x86's other numbers for the same calls
    for number in (socket, *never, 424, 425, 447):  # also pidfd_send_signal, io_uring_setup, memfd_secret
        rows += [(0x15, 0, 1, number), refuse]
    rows += [(0x15, 0, 1, 435), missing]  # clone3, whose flags are out of sight: libc falls back to clone
    rows += [(0x15, 0, 4, clone), load(16), (0x45, 0, 1, 0x10000), allow, refuse]  # a thread, else a process
    for number in to_others:
        rows += [(0x15, 0, 5, number), load(16), (0x15, 1, 0, own), (0x15, 0, 1, 0 if number == to_others[3] else own)]
        rows += [allow, refuse]
    rows += [allow]
    program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *row) for row in rows))

    class Filter(ctypes.Structure):
        _fields_ = [("size", ctypes.c_ushort), ("rows", ctypes.c_void_p)]

    value = Filter(len(rows), ctypes.addressof(program))
    check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(value), 0, 0), "seccomp")


def check_walls(layers, locked, user):
    if "namespaces" not in layers and not locked and user == 0:
        raise OSError("without namespaces and Landlock a program of root could write anywhere; run as another user")


def become_runner(settings):
    os.setsid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.chdir(settings["folder"])
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: int(settings["timeout"]) + 1,
        resource.RLIMIT_FSIZE: settings["disk"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_AS: settings["memory"],
    }
    if "namespaces" not in settings["layers"] and os.geteuid() == 0:
        for capability in range(64):  # else exec would give root all of them again
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check_walls(settings["layers"], landlock(settings["folder"]), os.geteuid())
    for name, most in limits.items():
        resource.setrlimit(name, (most, most))
    if "seccomp" in settings["layers"]:
        seccomp()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    interpreter = [sys.executable, "-I", "-S", "-X", "utf8", "-c", RUNNER]
    numbers = [str(settings["source"]), str(settings["result"])]
    environment = {"PATH": "/usr/bin:/bin", "HOME": settings["folder"], "TMPDIR": settings["folder"], "LANG": "C.UTF-8"}
    os.execve(sys.executable, interpreter + numbers, environment)


def status(found):
    return 128 + os.WTERMSIG(found) if os.WIFSIGNALED(found) else os.WEXITSTATUS(found)


def be_init(settings):
    """Waits for the runner; ends with it, or when there are too many processes."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    close_files(settings["folder"], settings["disk"])
    runner = started(become_runner, settings)
    while True:
        pid, found = os.waitpid(-1, os.WNOHANG)
        if pid == runner:
            os._exit(status(found))
        if not pid:
            if sum(name.isdigit() for name in os.listdir("/proc")) > settings["processes"] + 1:
                os._exit(126)
            time.sleep(0.005)


def started(task, settings):
    """The pid of a new process that does this, and says on the result's pipe why it could not."""
    if pid := os.fork():
        return pid
    try:
        task(settings)
    except BaseException as error:
        os.write(settings["result"], f"setup: {error}".encode())
    finally:
        os._exit(127)


def guard(settings):
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until it is known whom to end
    if "namespaces" in settings["layers"]:
        enter_namespaces()
        child = started(be_init, settings)
    else:
        child = started(become_runner, settings)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os._exit(status(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    try:
        guard(wanted)
    except BaseException as error:
        os.write(wanted["result"], f"setup: {error}".encode())
        os._exit(127)
