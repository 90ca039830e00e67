"""What a Mac's make 3.81, bash 3.2, BSD tools and Python lack, found by reading.

Each rule is a regular expression with what is wrong, or what to write instead. They read one line
at a time and know no grammar: what they refuse by mistake is written in another way.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

Rules = dict[str, str]
"""A regular expression, and why what it finds can't stand."""

MAKE: Rules = {
    r"\.(?:ONESHELL|RECIPEPREFIX|SHELLFLAGS|EXTRA_PREREQS|NOTINTERMEDIATE|WAIT)\b": "make 3.82",
    r"^[^\t#=]*:{2,3}=": "::= is make 4",
    r"^[^\t#=]*[^\t#=\s]\s*!=": "!= is make 4; use $(shell)",
    r"^[^\t#=:]+&:": "targets made together (&:) are make 4.3",
    r"\$[({](?:file|guile|let|intcmp)\s": "a function of make 4",
    r"^(?:[^\t#]*:\s*)?private\b|^undefine\b|^load\b": "make 3.82",
    r"^define\s+\S+\s*[:?+]?=": "define with = is make 3.82",
}
SHELL: Rules = {
    # GNU make, from a script
    r"\bmake\b[^|;&]*\s(?:--output-sync|-O|--eval|-E|--trace|--shuffle)": "an option of make 4",
    # bash
    r"\b(?:declare|local|typeset)\s+-\w*[AgnluG]": "declare -A, -g, -n, -l and -u are bash 4",
    r"\$\{\w+(?:\[[^]]*\])?(?:\^|,)": "changing case is bash 4; use tr",
    r"\$\{[^}]*@[QEPAKaUuLk]\}": "${x@Q} is bash 4.4",
    r"\b(?:mapfile|readarray|coproc)\b": "bash 4",
    r"&>>|\|&": "bash 4; write 2>&1",
    r"\bwait\s+-[np]": "wait -n is bash 4.3",
    r"\b(?:EPOCHSECONDS|EPOCHREALTIME|BASHPID|SRANDOM|BASH_ARGV0)\b": "a variable of bash 4 or 5",
    r"\$\{\w+\[-\d|\$\{\w+:[^}:]*:\s*-\d": "an index from the end is bash 4.2",
    r";&|;;&": "bash 4",
    r"\bshopt\s+-s\s+(?:globstar|lastpipe|inherit_errexit|autocd|dirspell)": "bash 4",
    r"\[\[?\s+(?:!\s+)?-[vR]\s|\btest\s+-[vR]\s": "-v is bash 4.2; use ${x+set}",
    r"%\([^)]*\)T": "printf's time is bash 4.2; use date",
    r"\{0\d+\.\.|\{\w+\.\.\w+\.\.": "zeros or steps in {..} are bash 4",
    r"\bread\b[^|;&]*\s(?:-t\s*\d*\.\d|-\w*[iN]\b)": "bash 4",
    r"\bexec\s+\{\w+\}[<>]": "bash 4.1",
    r"\$'[^']*\\[uU]": r"\u in $'' is bash 4.2",
    r"(?<!\+)\"\$\{\w+\[@\]\}\"": 'an empty array is unset to bash 3.2: ${x[@]+"${x[@]}"}',
    # BSD's tools
    r"(?<![\w-])(?:cp|mv|ln|rm|mkdir|rmdir|touch|cat|ls|head|tail|sort|uniq|wc|cut|tr|tee|du|df|chmod|chown"
    r"|basename|dirname|sed|xargs|mktemp|stat|date|ps|find|seq|env|base64|readlink|uname"
    r")(?:\s+(?!-?--?\s)[^\s|;&]+)*\s+--(?:\s|[a-z])": "BSD's tools know no long options",
    r"\bsed\s(?:[^|;&]*\s)?-[nEr]*i(?:\s|$)": "sed -i needs a suffix: -i.bak",
    r"\bsed\s[^|;&]*(?:(?<!\\)\\[+?|])": "not in BSD's sed without -E",
    r"\b(?:readlink\s+-\w*[fem]|realpath)\b": "not on every Mac; cd and pwd -P",
    r"\bgrep\s[^|;&]*(?:-\w*P|--perl)": "grep -P is GNU's; use -E",
    r"\bstat\s+(?:-\w+\s+)*-\w*c": "stat -c is GNU's",
    r"\bdate\s(?:[^|;&]*\s)?(?:-d|-I|-\w*d\s)|\bdate\s[^|;&]*%N": "GNU's date",
    r"\bxargs\s(?:[^|;&]*\s)?-(?:r|d|a)\b": "xargs -r, -d and -a are GNU's",
    r"\bcp\s(?:[^|;&]*\s)?-\w*[tTu]\b|\bmv\s(?:[^|;&]*\s)?-\w*[tTu]\b": "GNU's cp and mv",
    r"\bln\s(?:[^|;&]*\s)?-\w*[rT]\b": "GNU's ln",
    r"\bmktemp\b(?!\s[^|;&)]*X{3})|\bmktemp\s[^|;&]*-\w*p\b": "mktemp needs a template: x.XXXXXX",
    r"(?:^|[|;&(]|\b(?:do|then|else|exec|if|while|!)\s)\s*(?:timeout|nproc|setsid|tac|shuf|ip|ss"
    r"|lsblk|getent|systemctl|useradd|prlimit|taskset|unshare|flock|watch)\s": "not on a Mac",
    r"\b(?:sha\d+sum|md5sum)\b": "use shasum",
    r"\bhead\s(?:[^|;&]*\s)?-[nc]\s*-\d": "GNU's head",
    r"\bsort\s(?:[^|;&]*\s)?-\w*[VR]\b": "GNU's sort",
    r"\bdu\s(?:[^|;&]*\s)?-\w*b|\bdf\s(?:[^|;&]*\s)?-\w*[BT]": "GNU's du and df",
    r"\bfind\s[^|;&]*-(?:printf|executable|regextype|readable|writable)\b": "GNU's find",
    r"\bfind\s+-": "BSD's find needs a folder",
    r"\bbase64\s[^|;&]*-w": "GNU's base64",
    r"\btouch\s(?:[^|;&]*\s)?-d\b": "GNU's touch",
    r"\bsleep\s+(?:infinity|\d+[smhd])": "BSD's sleep takes seconds",
    r"\becho\s+-e\b": "use printf",
    r"\bhostname\s+-[Ii]": "GNU's hostname",
    r"\bawk\b.*\b(?:gensub|strftime|systime|asort)\(": "gawk's",
    r"/proc/|/dev/shm|/sys/": "not on a Mac",
}  # fmt: skip
# What Python has on Linux alone, by the module that has it.
PYTHON = {
    "os": "sched_getaffinity sched_setaffinity pidfd_open memfd_create copy_file_range fdatasync "
    "posix_fadvise posix_fallocate eventfd getrandom setns unshare splice sync_file_range "
    "setresuid setresgid getresuid getresgid getxattr setxattr listxattr removexattr fork forkpty "
    "O_TMPFILE O_PATH O_DIRECT O_NOATIME RWF_DSYNC P_PIDFD timerfd_create",
    "socket": "SOCK_CLOEXEC SOCK_NONBLOCK MSG_NOSIGNAL MSG_MORE TCP_USER_TIMEOUT TCP_QUICKACK "
    "TCP_KEEPIDLE TCP_DEFER_ACCEPT SO_BINDTODEVICE SO_PEERCRED SO_PRIORITY SO_DOMAIN AF_NETLINK "
    "AF_PACKET AF_VSOCK",
    "signal": "SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT sigtimedwait sigwaitinfo pidfd_send_signal",
    "select": "epoll",
    "resource": "prlimit RLIMIT_NICE RLIMIT_RTPRIO RLIMIT_SIGPENDING RUSAGE_THREAD",
    "time": "CLOCK_BOOTTIME CLOCK_TAI pthread_getcpuclockid",
}


def make_problems(text: str) -> list[str]:
    """What make 3.81 would not understand, and what is wrong in the recipes and `$(shell)`."""
    problems = list(_problems(text, MAKE))
    recipes = (line if line.startswith("\t") or "$(shell" in line else "" for line in _joined(text))
    return problems + shell_problems("\n".join(recipes).replace("$$", "$"))


def shell_problems(text: str) -> list[str]:
    """What bash 3.2 and BSD's tools would not understand."""
    return list(_problems(text, SHELL))


def python_problems(source: str) -> list[str]:
    """What Python lacks on a Mac, and is wrong in the shell that stands in strings.

    A name may be used where `hasattr(module, "name")` stands in the same file.
    """
    tree = ast.parse(source)
    guarded, used = set(), []
    problems = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Name("hasattr"), [ast.Name(module), ast.Constant(str(name))]):
                guarded.add((module, name))
            case ast.Attribute(ast.Name(module), name) if name in PYTHON.get(module, "").split():
                used.append((node.lineno, module, name))
            case ast.Call(
                ast.Attribute(_, "get_context" | "set_start_method"), [ast.Constant("fork")]
            ):
                problems.append(f"{node.lineno}: a Mac's frameworks don't survive a fork")
    for line, module, name in used:
        if (module, name) not in guarded:
            problems.append(f"{line}: {module}.{name} is not on a Mac")
    for line, script in shell_in_python(tree):
        problems += [f"{line}: {problem}" for problem in shell_problems(script)]
    return problems


def shell_in_python(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of scripts in strings, and of commands written as lists of words."""
    inside: set[ast.AST] = set()  # docstrings, and the parts of f-strings
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= set(ast.walk(node)) - {node}
        if isinstance(node, ast.Expr):
            inside.add(node.value)
        if isinstance(node, (ast.List, ast.Tuple)) and node.elts:
            words = [_text(element) or "…" for element in node.elts]
            if re.fullmatch(r"[a-z][\w.-]*", words[0]) and _text(node.elts[0]):
                yield node.lineno, " ".join(words)
    for node in ast.walk(tree):
        text = None if node in inside else _text(node)
        if text is not None and _is_script(text):
            yield getattr(node, "lineno", 0), text


def paths_of_linux(source: str) -> list[str]:
    """Where strings, but for docstrings, name folders that no Mac has."""
    tree = ast.parse(source)
    said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        f"{node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and node not in said
        and re.match(r"/(?:proc|sys)\b|/dev/shm", str(node.value))
    ]


def _text(node: ast.AST) -> str | None:
    """A string, with `…` for what an f-string fills in."""
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.JoinedStr(parts):
            return "".join(_text(part) or "…" for part in parts)
    return None


def _is_script(text: str) -> bool:
    """Whether a string is read by a shell, as far as can be seen."""
    head = re.match(r"#!.*\b(?:ba|z)?sh\b", text)
    return bool(head) or bool(
        re.search(r"^\s*(?:exec|done|fi|esac|exit \d+)\b|\$\(\w", text, re.MULTILINE)
        and not re.search(r"^\s*(?:import|from|def|class) ", text, re.MULTILINE)
    )


def _problems(text: str, rules: Rules) -> Iterator[str]:
    for number, line in enumerate(_joined(text), 1):
        code = re.sub(r"(^|\s)#(?!!).*", "", line)  # without comments
        for pattern, why in rules.items():
            if hit := re.search(pattern, code):
                yield f"line {number}, {hit[0].strip()!r}: {why}"


def _joined(text: str) -> list[str]:
    """Lines, with those that go on after a backslash as one; their count stays."""
    joined: list[str] = []
    for line in text.splitlines():
        if joined and joined[-1].endswith("\\"):
            joined[-1] = joined[-1][:-1] + line.lstrip()
        else:
            joined.append(line)
    return joined
