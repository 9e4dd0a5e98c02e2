"""`posttrain serve-rewards`: verifiers over HTTP, in the foreground, for runs elsewhere."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.console import reported, warn
from posttrain.errors import UserError

if TYPE_CHECKING:
    from posttrain.launch.reward_server import RewardServer

EXAMPLES = """Examples

[cyan]posttrain serve-rewards math[/]                                        one reward, at /score
[cyan]posttrain serve-rewards math sql --option sql.db_root=data/db[/]       two, at /score/math and /score/sql
[cyan]posttrain serve-rewards math --strip '<|im_end|>'[/]                   for OpenRLHF's remote_rm_url: /get_reward
[cyan]posttrain serve-rewards math --host 0.0.0.0 --token-env TOKEN[/]       for other machines
"""


def command(
    names: Annotated[
        list[str], typer.Argument(metavar="REWARD...", help="Rewards of posttrain rewards.", show_default=False)
    ],
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="REWARD.KEY=VALUE",
            help="An option of a reward, as in YAML; may be repeated. Where one reward is served, KEY=VALUE will do.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Where to listen. Whoever reaches the port can have completions judged.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8100,
    token_env: Annotated[
        str | None,
        typer.Option(
            "--token-env",
            metavar="NAME",
            help="Environment variable with the token that every request must carry.",
            show_default="no token",
        ),
    ] = None,
    deadline: Annotated[
        float,
        typer.Option(
            "--deadline", metavar="SECONDS", min=0.1, max=3600.0, help="Longest time to read, and to judge, a request."
        ),
    ] = 60.0,
    max_requests: Annotated[
        int, typer.Option("--max-requests", metavar="N", min=1, help="Requests that are judged at a time.")
    ] = 32,
    max_mib: Annotated[int, typer.Option("--max-mib", metavar="MIB", min=1, help="Largest request.")] = 64,
    strip: Annotated[
        str,
        typer.Option(
            "--strip",
            metavar="TEXT",
            help="Cut off the end of OpenRLHF's queries, such as '<|im_end|>'.",
            show_default="nothing",
        ),
    ] = "",
) -> None:
    """Judge completions for others over HTTP until Ctrl-C: for the reward remote, and for OpenRLHF.

    It prints the lines to put into a recipe. Verifiers that may hang or crash judge in worker processes, as many as
    CPUs; the environment variable POSTTRAIN_REWARD_WORKERS says another number.
    """
    from posttrain.http import is_loopback
    from posttrain.launch.reward_server import RewardServer, servable

    with reported("stopped"):
        if repeated := {name for name in names if names.count(name) > 1}:
            raise UserError(f"The reward '{min(repeated)}' is named twice: name each once.")
        options = _options(assignments, names)
        verifiers = {name: servable(name, options[name]) for name in names}
        token = _token(token_env)
        server = RewardServer(
            verifiers,
            host=host,
            port=port,
            token=token,
            deadline=deadline,
            max_bytes=max_mib * 2**20,
            max_requests=max_requests,
            strip=strip,
        )
        with server:
            if not is_loopback(host):
                known = (
                    "whoever knows the token" if token is not None else "whoever reaches it, for want of --token-env,"
                )
                warn(f"{host} is more than this machine: {known} can have completions judged at port {server.port}.")
            typer.echo(_usage(server, token_env))
            server.serve()


def _options(assignments: Sequence[str] | None, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options by reward and name.

    Raises:
        UserError: one is no `[reward.]key=value`, names a reward that is not served, or is given twice.
    """
    from posttrain.recipe import parse_value

    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for assignment in assignments or ():
        place, equals, value = assignment.partition("=")
        reward, _, key = place.rpartition(".")
        reward = reward or (names[0] if len(names) == 1 else "")
        if not equals or not key.strip():
            raise UserError(
                f"--option takes reward.key=value, not '{assignment}': write for instance math.deadline=2.0."
            )
        if reward not in found:
            whose = f"the reward '{reward}', which is not served" if reward else "no reward"
            raise UserError(f"--option {assignment} names {whose}: begin it with one of {', '.join(names)} and a dot.")
        if key in found[reward]:
            raise UserError(f"--option {place} is given twice: keep one.")
        found[reward][key] = parse_value(value)
    return found


def _token(name: str | None) -> str | None:
    """The token.

    Raises:
        UserError: its variable is not set, or holds what no header can.
    """
    if name is None:
        return None
    token = os.environ.get(name, "")
    if not re.fullmatch(r"[!-~]+", token):
        found = "is not set" if not token else "holds a space, a line break or another sign that no token has"
        raise UserError(f"--token-env names the variable {name}, which {found}: set it.")
    return token


def _usage(server: RewardServer, token_env: str | None) -> str:
    alone = len(server.verifiers) == 1
    lines, calls = [], []
    secret = "" if token_env is None else f' -H "Authorization: Bearer ${token_env}"'
    for name, verifier in server.verifiers.items():
        columns = [*verifier.requires, *verifier.sampled]
        url = f"{server.url}/score" if alone else f"{server.url}/score/{name}"
        options: Mapping[str, Any] = {
            "url": json.dumps(url),
            "label": name,
            **({"accuracy": "true"} if verifier.accuracy else {}),
            **({"columns": f"[{', '.join(columns)}]"} if columns else {}),
            **({} if token_env is None else {"api_key_env": token_env}),
        }
        settings = ", ".join(f"{key}: {value}" for key, value in options.items())
        lines.append(f"  - {{name: remote, options: {{{settings}}}}}")
        body = json.dumps({"completions": ["5"], "rows": [dict.fromkeys(columns, "5")]})
        calls.append(f"curl {url}{secret} -H 'Content-Type: application/json' -d '{body}'")
    listed = "\n".join(lines)
    return f"""{", ".join(server.verifiers)} served at {server.url}. In a recipe:

rewards:
{listed}

Try it:

{calls[0]}

Ctrl-C stops it."""
