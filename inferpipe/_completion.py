"""Completion scripts for shells, made from the parser.

Owns three templates. They complete commands, options and choices, and look up no ids. Invariant: a
script starts no process, so that a tab never waits for a server.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True, slots=True)
class Level:
    """One place in the tree of commands: the words to get there, and what may follow.

    `words` and `options` map names to their help; `choices` an option to what it takes.
    """

    path: str
    words: dict[str, str]
    options: dict[str, str]
    choices: dict[str, tuple[str, ...]]


def levels(parser: argparse.ArgumentParser, path: str = "") -> Iterator[Level]:
    """Yield every place, the root first."""
    words: dict[str, str] = {}
    options: dict[str, str] = {}
    choices: dict[str, tuple[str, ...]] = {}
    below: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            below = dict(action.choices)
            helps = {one.dest: one.help or "" for one in action._choices_actions}  # noqa: SLF001
            words = {name: helps.get(name, "") for name in below}
        elif action.option_strings:
            for name in action.option_strings:
                options[name] = action.help or ""
                if action.choices is not None:
                    choices[name] = tuple(map(str, action.choices))
        elif action.choices is not None:
            words = {str(choice): "" for choice in action.choices}
    yield Level(path, words, options, choices)
    for name, inner in below.items():
        yield from levels(inner, f"{path} {name}".strip())


def script_for(shell: str, parser: argparse.ArgumentParser) -> str:
    """Return the script; to be read by the shell at its start."""
    found = list(levels(parser))
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](found)


def _bash(found: list[Level]) -> str:
    return f"""\
# bash completion of inferpipe; in ~/.bashrc: source <(inferpipe completion bash)
_inferpipe() {{
    local at=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} path= words= i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$path ${{COMP_WORDS[i]}}" in
            {_steps(found)}) path="${{path:+$path }}${{COMP_WORDS[i]}}" ;;
        esac
    done
    case "$path $before" in
{_choices(found)}
        *) case "$path" in
{_cases(found)}
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$at"))
}}
complete -o default -F _inferpipe inferpipe
"""


def _zsh(found: list[Level]) -> str:
    return f"""\
#compdef inferpipe
# zsh completion of inferpipe; in ~/.zshrc, after compinit: source <(inferpipe completion zsh)
_inferpipe() {{
    local before=${{words[CURRENT - 1]}} place= found= i
    for ((i = 2; i < CURRENT; i++)); do
        case "$place ${{words[i]}}" in
            {_steps(found)}) place="${{place:+$place }}${{words[i]}}" ;;
        esac
    done
    case "$place $before" in
{_choices(found, "found")}
        *) case "$place" in
{_cases(found, "found")}
        esac ;;
    esac
    compadd -- ${{=found}} || _files
}}
compdef _inferpipe inferpipe
"""


def _fish(found: list[Level]) -> str:
    lines = [
        "# fish completion of inferpipe; in config.fish: inferpipe completion fish | source",
        "function __inferpipe_at",
        "    set -l path",
        "    set -l before (commandline -opc)",
        "    set -e before[1]",
        "    for word in $before",
        "        switch (string join ' ' $path $word)",
        f"            case {_fish_steps(found)}",
        "                set path $path $word",
        "        end",
        "    end",
        '    test "$path" = "$argv[1]"',
        "end",
    ]
    for level in found:
        at = f"complete -c inferpipe -n '__inferpipe_at \"{level.path}\"'"
        lines += [f"{at} -f -a {word} -d {_quoted(text)}" for word, text in level.words.items()]
        for name, text in level.options.items():
            if not name.startswith("--"):
                continue
            taken = " ".join(level.choices.get(name, ()))
            values = f" -x -a {_quoted(taken)}" if taken else ""
            lines.append(f"{at} -l {name[2:]} -d {_quoted(text)}{values}")
    return "\n".join(lines) + "\n"


def _steps(found: list[Level]) -> str:
    """Patterns of a path and the word that leads on from it."""
    steps = (level.path.rpartition(" ") for level in found if level.path)
    return "|".join(f'"{before} {word}"' for before, _, word in steps)


def _fish_steps(found: list[Level]) -> str:
    return " ".join(_quoted(level.path) for level in found if level.path)


def _choices(found: list[Level], variable: str = "words") -> str:
    return "\n".join(
        f'        "{level.path} {name}") {variable}="{" ".join(taken)}" ;;'
        for level in found
        for name, taken in level.choices.items()
    )


def _cases(found: list[Level], variable: str = "words") -> str:
    return "\n".join(
        f'            "{level.path}") {variable}="{" ".join((*level.words, *level.options))}" ;;'
        for level in found
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
