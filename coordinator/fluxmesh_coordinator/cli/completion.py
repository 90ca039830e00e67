"""`fluxmesh completion`: a shell's Tab knows commands, options, models, adapters and hosts.

The shell asks `fluxmesh` itself at each Tab, by way of click (`_FLUXMESH_COMPLETE`); what is asked
here loads no mlx and no network. zsh and fish run click's own scripts. bash runs one of ours: the
bash of macOS is 3.2, click's script needs 4.4.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import click
from click.shell_completion import CompletionItem, get_completion_class

VARIABLE = "_FLUXMESH_COMPLETE"
BASH = """\
_fluxmesh_completion() {
    local kind value word="${COMP_WORDS[COMP_CWORD]}"
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case "$kind" in
            plain) COMPREPLY+=("$value") ;;
            file) _fluxmesh_paths -f "$word" ;;
            dir) _fluxmesh_paths -d "$word" ;;
        esac
    done < <(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD="$COMP_CWORD" \\
        _FLUXMESH_COMPLETE=bash_complete "$1" 2>/dev/null)
}

_fluxmesh_paths() {
    local path
    while IFS= read -r path; do
        COMPREPLY+=("$path")
    done < <(compgen "$1" -- "$2")
    # Since bash 4, which then ends a folder with a slash instead of a space.
    if type compopt >/dev/null 2>&1; then compopt -o filenames; fi
}

complete -F _fluxmesh_completion fluxmesh
"""
# A Mac's zsh has no completion until its user asks for it.
ZSH_BEGINS = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\n"


@click.command(short_help="Print what teaches a shell to complete fluxmesh.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that lets SHELL complete commands, options, models, adapters and hosts.

    \b
    bash (3.2 and newer), in ~/.bashrc, on a Mac in ~/.bash_profile:
      eval "$(fluxmesh completion bash)"
    zsh, in ~/.zshrc:
      eval "$(fluxmesh completion zsh)"
    fish:
      fluxmesh completion fish > ~/.config/fish/completions/fluxmesh.fish
    """
    from fluxmesh_coordinator.cli import cli

    if shell == "bash":
        click.echo(BASH, nl=False)
        return
    kind = get_completion_class(shell)
    assert kind is not None  # click has both
    script = kind(cli, {}, "fluxmesh", VARIABLE).source()
    if shell == "zsh":
        head, _, rest = script.partition("\n")
        script = f"{head}\n{ZSH_BEGINS}{rest}"
    click.echo(script.rstrip("\n"))


# What parameters complete to


def complete_models(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    """Models that are on this machine; a folder or a file is one too."""
    from fluxmesh.weights.hub import names_here

    items = [CompletionItem(name) for name in _beginning(names_here(), begun)]
    return items if items and begun == "" else [*items, CompletionItem(begun, type="file")]


def complete_adapters(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    """LoRA files, and folders, which may hold some."""
    head, tail = os.path.split(begun)
    try:
        names = sorted(os.listdir(os.path.expanduser(head) or "."))
    except OSError:
        names = []
    files = (name for name in names if name.endswith(".safetensors"))
    here = [CompletionItem(os.path.join(head, name)) for name in _beginning(files, tail)]
    return [*here, CompletionItem(begun, type="dir")]


def complete_hosts(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    """Ranks and names of the mesh that is up."""
    from fluxmesh.errors import FluxmeshError
    from fluxmesh_coordinator.agents import mesh_file

    try:
        mesh = mesh_file.load()
        hosts = mesh.hosts if mesh is not None else ()
    except FluxmeshError:
        return []
    ranks = [CompletionItem(str(host.rank), help=host.name) for host in hosts]
    names = [CompletionItem(name) for name in dict.fromkeys(host.name for host in hosts)]
    return [item for item in (*ranks, *names) if item.value.startswith(begun)]


def complete_data_sets(
    _context: click.Context, _parameter: click.Parameter, begun: str
) -> list[CompletionItem]:
    """Folders: a data set of the Hub is not looked up at a Tab."""
    return [CompletionItem(begun, type="dir")]


def _beginning(names: Iterable[str], begun: str) -> list[str]:
    return [name for name in names if name.startswith(begun)]
