"""What ends with what, and the network: some of it only Linux can do."""

import contextlib
import ctypes
import os
import signal
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


def _libc(name, *arguments) -> bool:
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) == 0
    except (OSError, AttributeError, TypeError):  # this system doesn't have it
        return False


def adopt_orphans() -> bool:
    """Become the parent of what leaves a descendant of this process, if the system can."""
    return _libc("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent(number: int, parent: int) -> bool:
    """Have this process get a signal when its parent ends, whose id it was when it was started."""
    done = _libc("prctl", PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), number)
    return done


def leave_network() -> bool:
    """Have no network from here on, in this process and its children."""
    if _libc("unshare", CLONE_NEWNET):  # the superuser may
        return True
    user, group = os.getuid(), os.getgid()
    if not _libc("unshare", CLONE_NEWUSER | CLONE_NEWNET):
        return False
    with contextlib.suppress(OSError):  # keep the names of user and group
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def descendants(ancestor: int) -> set[int]:
    """Return the ids of all processes that come of one, zombies included; none without /proc."""
    children = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
        if entry.isdigit():
            with contextlib.suppress(OSError):
                line = Path("/proc", entry, "stat").read_text(errors="replace")
                parent = int(line.rpartition(")")[2].split()[1])
                children.setdefault(parent, set()).add(int(entry))
    found, new = set(), {ancestor}
    while new:
        new = set().union(*(children.get(each, set()) for each in new)) - found
        found |= new
    return found


def end_descendants(group: int = 0) -> None:
    """End a process group, if one is given, and all that comes of this process; wait for them."""
    for _ in range(200):  # a fork bomb may be faster once or twice
        with contextlib.suppress(OSError):
            if group:
                os.killpg(group, signal.SIGKILL)
        left = descendants(os.getpid())
        for each in left:
            with contextlib.suppress(OSError):
                os.kill(each, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG if left else 0)[0]:
                pass
        if not left:
            return
