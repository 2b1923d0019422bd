"""Programs in the sandbox: what they can do, and that hostile ones can do nothing else."""

import errno
import os
import pickle
import platform
import struct
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from fastalign.rewards import confinement
from fastalign.rewards.code_execution import code_execution_reward, find_program, get_code_execution_reward
from fastalign.rewards.sandbox import Limits, Outcome, Program, Sandbox, SandboxError
from fastalign.rewards.syscalls import ALLOWED, CONDITIONAL, WRITING

confined = pytest.mark.skipif(confinement.obstacle() is not None, reason=str(confinement.obstacle()))
LIMITS = Limits(timeout=20.0, memory=256 << 20, file_size=1 << 20, output=4096)


@pytest.fixture(scope="module")
def sandbox():
    box = Sandbox(LIMITS, size=2)
    yield box
    box.close()


@pytest.fixture(scope="module")
def hasty():
    box = Sandbox(replace(LIMITS, timeout=0.5), size=1)
    yield box
    box.close()


def run(sandbox, source, **more) -> Outcome:
    return sandbox.run([Program(source, **more)])[0]


def run_on_disk(folder, source) -> str:
    """What a worker of its own, which mounts nothing over `folder`, says of a program."""
    request = vars(Program(source)) | vars(LIMITS)
    code = f"from fastalign.rewards import sandbox_worker\nprint(sandbox_worker.run({request!r}, {str(folder)!r}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


@confined
def test_programs_compute(sandbox):
    programs = [
        Program("import math\nprint(math.factorial(int(input())), input())", stdin="5\nzwölf\n"),
        Program("def f(x):\n    return x * x", tests="assert f(3) == 9"),
        Program("def f(x):\n    return x * x", tests="assert f(3) == 6, 'three'"),
        Program("if __name__ == '__main__':\n    import sys\n    print('x', file=sys.stderr)\n    sys.exit(3)"),
        Program("print(1"),
        Program("import threading\nt = threading.Thread(target=lambda: print('from a thread'))\nt.start()"),
        Program("import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    print('async')\nasyncio.run(f())"),
        Program(
            "open('note', 'w').write('kept')\nimport os\nos.mkdir('d')\nprint(open('note').read(), os.listdir('.'))"
        ),
        Program("import atexit, json, re, decimal\natexit.register(print, 'end')\nprint(json.dumps([1]))"),
        Program("print(open('note').read())"),  # of the program before
        Program("import random\nprint(random.random())"),
        Program("import random\nprint(random.random())"),
    ]
    found = sandbox.run(programs)
    assert [one.status for one in found] == ["ok", "ok", "error", "error", "error"] + ["ok"] * 4 + [
        "error",
        "ok",
        "ok",
    ]
    assert [one.passed for one in found] == [one.status == "ok" for one in found]
    assert found[0].stdout == "120 zwölf\n"
    assert found[2].stderr.endswith("AssertionError: three\n") and found[3].stderr == "x\n"
    assert "SyntaxError" in found[4].stderr and found[5].stdout == "from a thread\n" and found[6].stdout == "async\n"
    assert found[7].stdout in ("kept ['note', 'd']\n", "kept ['d', 'note']\n") and found[8].stdout == "[1]\nend\n"
    assert "FileNotFoundError" in found[9].stderr and found[10].stdout != found[11].stdout


@confined
@pytest.mark.parametrize(
    "source, status",
    [
        ("while True:\n    pass", "timeout"),
        ("import time\ntime.sleep(99)", "timeout"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
        ("import signal\nfor s in {*range(1, 31)} - {9, 19}:\n    signal.signal(s, signal.SIG_IGN)\n1 / 0", "error"),
        ("import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True:\n    pass", "timeout"),
        ("import os\nos.closerange(0, 99)\nwhile True:\n    pass", "timeout"),
        ("while True:\n    print('x' * 999)", "output"),
        ("import sys\nwhile True:\n    sys.stderr.write('x' * 999)", "output"),
        ("x = bytearray(1 << 30)", "error"),
        ("x = []\nwhile True:\n    x.append(bytearray(30 << 20))", "error"),
        ("import mmap\nmmap.mmap(-1, 1 << 30)", "error"),
        ("f = open('f', 'wb')\nwhile True:\n    f.write(bytes(99999))", "error"),
        ("import os\nos.memfd_create('x')", "error"),
        ("import os\nos.kill(os.getpid(), 9)", "killed"),
        ("import ctypes\nctypes.string_at(0)", "killed"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef f():\n    return f()\nf()", ("killed", "error", "timeout")),
        ("import _thread, time\nfor _ in range(999):\n    _thread.start_new_thread(time.sleep, (9,))", "error"),
    ],
)  # fmt: skip
def test_limits_hold(sandbox, hasty, source, status):
    start = time.monotonic()
    found = run(hasty if "timeout" in status else sandbox, source, tests="pass")
    assert found.status in status if isinstance(status, tuple) else found.status == status
    assert not found.passed and time.monotonic() - start < LIMITS.timeout + 5
    assert len(found.stdout) <= LIMITS.output and len(found.stderr) <= LIMITS.output
    assert run(sandbox, "print(1)").stdout == "1\n"


@confined
@pytest.mark.parametrize(
    "call",
    [
        "os.fork()",
        "subprocess.run(['/bin/true'])",
        "os.posix_spawn('/bin/true', [], {})",
        "multiprocessing.Process(target=print).start()",
        "os.execv('/bin/true', ['true'])",
        "socket.create_connection(('127.0.0.1', 9))",
        "socket.socket(socket.AF_UNIX)",
        "socket.getaddrinfo('example.org', 80)",
        "socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'', '/run/x')",
        "os.kill(os.getppid(), 9)",
        "os.kill(-1, 9)",
        "os.kill(1, 0)",
        "os.killpg(os.getpgid(os.getppid()), 9)",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "open('/proc/self/environ').read()",
        "open(f'/proc/{os.getppid()}/environ').read()",
        "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
        "os.listdir(HOME)",
        "open(SECRET).read()",
        "open(SECRET, 'w')",
        "open(SECRET, 'a')",
        "open(os.path.join(OUTSIDE, 'new'), 'w')",
        "os.unlink(SECRET)",
        "os.rename(SECRET, 'mine')",
        "os.link(SECRET, 'mine')",
        "os.mkdir(os.path.join(OUTSIDE, 'new'))",
        "os.truncate(SECRET, 0)",
        "os.chmod(SECRET, 0o777)",
        "os.chown(SECRET, 1, 1)",
        "os.utime(SECRET)",
        "open('/dev/shm/x', 'w')",
        "open('/dev/tty')",
        "os.setuid(0)",
        "os.setpriority(os.PRIO_USER, 0, -5)",
        "os.sched_setaffinity(os.getppid(), {0})",
        "os.symlink(SECRET, 'mine') or open('mine').read()",
        "ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) + 1 or os.stat('none')",
        "ctypes.CDLL(None).unshare(0x10000000) + 1 or os.stat('none')",
        "ctypes.CDLL(None).shmget(0, 4096, 0o1600) + 1 or os.stat('none')",
    ],
)
def test_what_reaches_outside_is_refused(sandbox, tmp_path, call):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    before = (secret.stat().st_mode, secret.stat().st_mtime_ns, secret.stat().st_uid)
    names = f"HOME, OUTSIDE, SECRET = {os.path.expanduser('~')!r}, {str(tmp_path)!r}, {str(secret)!r}"
    imports = "import ctypes, multiprocessing, os, resource, socket, subprocess"
    found = run(sandbox, f"{imports}\n{names}\ntry:\n    {call}\nexcept (OSError, ValueError):\n    print('refused')")
    assert (found.status, found.stdout) == ("ok", "refused\n"), found
    assert secret.read_text() == "secret" and [*tmp_path.iterdir()] == [secret]
    assert (secret.stat().st_mode, secret.stat().st_mtime_ns, secret.stat().st_uid) == before


@confined
def test_the_environment_is_not_the_trainers(sandbox, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    box = Sandbox(LIMITS, size=1)
    found = run(box, "import os\nprint(sorted(os.environ), os.getcwd() == os.environ['HOME'])")
    box.close()
    assert "HF_TOKEN" not in found.stdout and "True" in found.stdout
    if os.geteuid() == 0:
        assert run(sandbox, "import os\nprint(os.getuid())").stdout == f"{confinement.NOBODY}\n"


@confined
def test_no_test_passes_by_ending_early_or_by_saying_so(sandbox):
    for source in (
        *("import os\nos._exit(0)", "import sys\nsys.exit(0)", "raise SystemExit", "exit"),
        "import os\nos.write(3, b'\\x01')\nos._exit(0)",
        "import builtins\nbuiltins.exec = print",
        "import builtins\nreal = compile\nbuiltins.compile = lambda *a: real('pass', 'x', 'exec')",
        "import os\nos.write(3, b'!')\nos._exit(0)",
    ):
        assert not run(sandbox, source, tests="assert False").passed


@confined
def test_what_confines_fails_is_no_wrong_answer(tmp_path):
    """Nor is Python that the program could not read: both would score every answer 0."""
    request = vars(Program("print(1)")) | vars(LIMITS)
    code = f"""
import os
from fastalign.rewards import confinement, sandbox_worker
def fail(folder):
    raise OSError(1, "no")
limit_files, confinement._limit_files = confinement._limit_files, fail
print(sandbox_worker.run({request!r}, {str(tmp_path)!r}))
confinement._limit_files, os.__file__ = limit_files, {str(tmp_path / "hidden" / "os.py")!r}
print(sandbox_worker.run({request!r}, {str(tmp_path)!r}))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == str({"status": "refused", "stderr": "PermissionError: [Errno 1] no"})
    if os.geteuid() == 0:
        assert "'refused'" in second and "--cap-add DAC_READ_SEARCH" in second


@confined
def test_folders_of_any_depth_are_removed(tmp_path):
    deep = (
        "import os\nfor _ in range(1500):\n    os.mkdir('d', 0o300)\n    os.chdir('d')\nopen('f', 'w')\nprint('made')"
    )
    assert "'stdout': 'made\\n'" in run_on_disk(tmp_path, deep)
    assert [*tmp_path.iterdir()] == []


@confined
def test_a_worker_that_dies_is_replaced_and_no_folder_stays():
    box = Sandbox(LIMITS, size=1)
    run(box, "pass")
    folder, worker = box._pool._folder, box._pool._idle.queue[0]
    assert os.path.isdir(folder)
    worker.process.kill()
    worker.process.wait()
    assert run(box, "print(2)").stdout == "2\n"
    box.close()
    assert not os.path.exists(folder)
    assert run(box, "print(3)").stdout == "3\n"  # and it starts again
    box.close()


@confined
@pytest.mark.parametrize("landlock", [True, False])
def test_without_landlock_nothing_can_be_written(tmp_path, landlock):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    for folder in (outside, inside):
        folder.mkdir()
        folder.chmod(0o777)
    (outside / "kept").write_text("")
    code = f"""
import os, sys
from fastalign.rewards import confinement
if not {landlock}:
    confinement._limit_files = lambda folder: False
folder, other = {str(inside)!r}, {str(outside)!r}
child = os.fork()
if child == 0:
    confinement.confine(folder, os.getppid())
    for place in (folder, other):
        for act in (lambda: open(f"{{place}}/f", "w").close(), lambda: os.mkdir(f"{{place}}/d"),
                    lambda: os.listdir(place), lambda: os.rename(f"{{place}}/kept", f"{{place}}/gone")):
            try:
                act()
                print("done", end=" ")
            except OSError as error:
                print(error.errno, end=" ")
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    refused, missing = str(errno.EPERM), str(errno.ENOENT)
    if landlock and confinement.libc.syscall(444, None, 0, 1) > 0:
        denied = str(errno.EACCES)
        assert done.stdout.split() == ["done", "done", "done", missing, denied, denied, denied, denied]
    else:
        assert done.stdout.split() == [refused, refused, "done", refused] * 2
    assert [path.name for path in outside.iterdir()] == ["kept"]


@confined
def test_a_folder_on_disk_serves_where_none_can_be_mounted(tmp_path):
    found = run_on_disk(tmp_path, "open('f', 'w').write('x' * 9)\nprint(open('f').read())")
    assert "'status': 'ok', 'passed': True, 'stdout': 'xxxxxxxxx\\n'" in found
    assert [*tmp_path.iterdir()] == []


def judge(code: bytes, architecture: int, number: int, arguments: tuple[int, ...]) -> int:
    """What a filter answers, computed as the kernel does."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *[*arguments, 0, 0, 0, 0, 0, 0][:6])
    place, value = 0, 0
    while True:
        operation, if_true, if_false, operand = struct.unpack_from("=HBBI", code, place * 8)
        place += 1
        if operation == confinement.RETURN:
            return operand
        if operation == confinement.LOAD:
            value = struct.unpack_from("=I", data, operand)[0]
        else:
            is_true = value == operand if operation == confinement.IS else value & operand
            place += if_true if is_true else if_false


@pytest.mark.parametrize("machine", [*confinement.ARCHITECTURES])
@pytest.mark.parametrize("writing", [True, False])
def test_the_filter_of_each_machine(machine, writing):
    name, column = confinement.ARCHITECTURES[machine]
    code = confinement.build_filter(machine, 77, allow_writing=writing)

    def answer(number, *arguments):
        return judge(code, name, number, arguments)

    allow, refuse = confinement.ALLOW, confinement.REFUSE
    known = {number[column] for number in (*ALLOWED.values(), *CONDITIONAL.values())}
    for call, number in ALLOWED.items():
        if number[column] is not None:
            assert answer(number[column]) == (allow if writing or call not in WRITING else refuse), call
    assert all(answer(number) == refuse for number in range(600) if number not in known)
    assert judge(code, 0x40000003, 0, ()) == confinement.KILL  # 32-bit calls
    assert answer(0x40000000 + 39) == refuse  # x32 calls

    numbers = {call: number[column] for call, number in CONDITIONAL.items()}
    pthread, fork = 0x3D0F00, 0x1200011
    assert [answer(numbers["clone"], flags) for flags in (pthread, fork, 17)] == [allow, refuse, refuse]
    assert answer(numbers["clone3"]) == 0x00050000 | errno.ENOSYS
    for call, own in (("kill", 77), ("tgkill", 77), ("prlimit64", 0), ("prlimit64", 77)):
        assert answer(numbers[call], own) == allow
        assert {answer(numbers[call], other) for other in (1, 76, 2**32 - 1, 2**32 - 77)} == {refuse}
    assert [answer(numbers["kill"], 0), answer(numbers["tgkill"], 0)] == [refuse, refuse]
    assert [answer(numbers["sendto"], 5, 1, 1, 0, a) for a in (0, 1, 1 << 32)] == [allow, refuse, refuse]
    flags = (os.O_RDONLY, os.O_RDONLY | os.O_CLOEXEC, os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_RDONLY | os.O_TRUNC)
    expected = [allow] * 6 if writing else [allow, allow, refuse, refuse, refuse, refuse]
    assert [answer(numbers["openat"], 0, 0, flag) for flag in flags] == expected
    if numbers["open"] is not None:
        assert [answer(numbers["open"], 0, flag) for flag in flags] == expected


def test_machines_without_confinement_refuse(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert "this is linux on riscv64" in (confinement.obstacle() or "")
    box = Sandbox(size=1)
    with pytest.raises(SandboxError, match="cannot be run safely here: it needs Linux"):
        box._outcome({"status": "refused", "stderr": confinement.obstacle()})


# The reward


def test_the_program_of_an_answer():
    assert find_program("text\n```python\na = 1\n```\nmore\n``` py\nb = 2\n```\nend") == "b = 2"
    assert find_program("```\nc\n```") == "c"
    assert find_program("```json\n{}\n```") == ""
    assert find_program("```python\nx = 1\ny = 2") == "x = 1\ny = 2"  # cut off
    assert find_program("print(1)") == "print(1)"


@confined
def test_rewards_are_shares_of_passed_tests():
    reward = get_code_execution_reward(timeout=2, num_workers=2)
    double = "Sure:\n```python\ndef f(x):\n    return 2 * x\nprint(f(int(input() or 0)))\n```\nas asked."
    completions = [
        "```python\ndef f(x):\n    return 2 * x\n```",
        [{"role": "assistant", "content": "```python\ndef f(x):\n    return x * x\n```"}],
        "```python\nprint(2 * int(input()))\n```",
        "```python\nwhile True: pass\n```",
        "```rust\nfn main() {}\n```",
        double,
        "print(1)",
    ]
    tests = [
        ["assert f(2) == 4", "assert f(3) == 6"],
        ["assert f(2) == 4", "assert f(3) == 6"],
        [{"input": "2", "output": "4\n"}, {"input": "5\n", "output": "10   \n\n"}, {"input": "x", "output": "1"}],
        "pass",
        "pass",
        {"input": "4", "output": "8"},
        None,
    ]
    log = {}
    assert reward(completions, tests=tests, log_extra=log.__setitem__, prompts=[]) == [1, 0.5, 2 / 3, 0, 0, 1, None]
    notes = log["code_execution"]
    assert notes[0] == "" and notes[1] == "error: AssertionError" and notes[2].startswith("error: ValueError")
    assert notes[3] == "timeout" and notes[4] == "error: no Python code in the answer"
    assert pickle.loads(pickle.dumps(reward))(completions[:1], tests=tests[:1]) == [1.0]
    assert code_execution_reward(["print(1)"], [{"output": "2"}], log_extra=log.__setitem__) == [0.0]
    assert log["code_execution"] == ["wrong output"]


def test_wrong_tests_and_limits_are_named():
    with pytest.raises(ValueError, match="`tests` has 3"):
        code_execution_reward(["x"], tests=[[3]])
    with pytest.raises(ValueError, match=r"`tests` has \{'input': '1'\}"):
        code_execution_reward(["x"], tests=[{"input": "1"}])
    with pytest.raises(ValueError, match="`memory` of the code execution reward is 0"):
        get_code_execution_reward(memory=0)
