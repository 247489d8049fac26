"""Flower's own simulation, on Ray, with the same apps."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from benchmarks.arms.apps import client_app, rounds
from benchmarks.arms.pace import Case, Pace


def main() -> None:
    """Takes its turns, inside a ServerApp."""
    pace, case = Pace.of_command_line()
    run_simulation(
        server_app=server_app(pace, case),
        client_app=client_app(case),
        num_supernodes=case.sites,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": case.workers},
        },
    )


def server_app(pace: Pace, case: Case) -> ServerApp:
    """Rounds as they are asked for."""
    app = ServerApp()

    @app.main()
    def run(grid: Grid, context: Context) -> None:
        pace.run(rounds(grid, case, pace))

    return app


if __name__ == "__main__":
    main()
