"""`coterie node`: the long-lived process beside a site's records."""

from importlib import metadata

from client.settings import NODE, NodeSettings
from common.cli import Invocation, emit_json
from common.code import check_flower
from common.composition import run_with
from common.log_lines import begin_log


def node(invocation: Invocation) -> None:
    """Answer a coordinator's instructions beside a site's own records, by its own policy."""

    def job(settings: NodeSettings) -> None:
        check_flower(metadata.version("flwr"))
        begin_log(settings.log)  # before libraries that would begin one of their own
        # torch and the model come with it: whoever mistyped a setting does not wait for them.
        from client.service import run_node  # noqa: PLC0415

        answer = run_node(settings)
        if invocation.json:
            emit_json(answer)

    run_with(NODE, job, invocation)
