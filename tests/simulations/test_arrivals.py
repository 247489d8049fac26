"""Who comes first in a simulation follows from settings, and never from the machine it runs on."""

from collections import Counter
from dataclasses import replace

import numpy as np
from flwr.app import Message, RecordDict
from safetensors.numpy import load_file

from client.ledger import Store
from common.config import FaultsConfig
from common.privacy.chain import Kind
from server.aggregate import LATE
from server.record import whole_lines
from simulations.arrivals import Arrivals

from ..server.fake_grid import FakeGrid

NAMES = {node: f"site-{node - 1}" for node in range(2, 8)}
SETTINGS = (
    *("federation.sites=4", "federation.quorum=0.5", "federation.enough=0.5"),
    *("federation.rounds=3", "privacy.noise=seeded"),
)


class OneByOne(FakeGrid):
    """Gives one reply at a pull, the last that was asked for first."""

    def pull_messages(self, message_ids):
        return super().pull_messages(sorted(message_ids)[-1:])


def heard(config, number=1, ttl=60.0):
    """The nodes in the order in which their replies are handed on."""
    grid = Arrivals(OneByOne(NAMES, lambda _, sent: Message(RecordDict(), reply_to=sent)), config)
    outgoing = [
        Message(RecordDict(), node, "train", ttl=ttl, group_id=str(number)) for node in NAMES
    ]
    ids = grid.push_messages(outgoing)
    replies = grid.pull_messages(ids)
    assert {reply.metadata.reply_to_message_id for reply in replies} == {*ids}
    return [reply.metadata.src_node_id for reply in replies]


def test_all_are_heard_before_the_first_is_handed_on_in_an_order_of_public_coins(tiny_config):
    orders = {tuple(heard(tiny_config, number)) for number in range(1, 6)}
    assert len(orders) > 1
    assert heard(tiny_config) == heard(tiny_config)
    assert heard(replace(tiny_config, seed=tiny_config.seed + 1)) != heard(tiny_config)


def test_quick_sites_come_before_slow_ones(tiny_config):
    faults = FaultsConfig(speeds=[0.5, 2.0])
    order = heard(replace(tiny_config, faults=faults))
    assert {*order[:3]} == {3, 5, 7}


def test_a_message_that_expires_is_not_waited_for(tiny_config):
    grid = Arrivals(FakeGrid(NAMES, lambda *_: None), tiny_config)
    message = Message(RecordDict(), 2, "train", ttl=0.05, group_id="1")
    assert grid.pull_messages(grid.push_messages([message])) == []


def test_a_seeded_run_is_the_same_on_any_number_of_workers_and_all_sites_pay(
    coterie, tiny_overrides, tmp_path
):
    vectors, refused, kinds = [], [], []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        given = [*SETTINGS, f"engine.workers={workers}", f"run_dir={folder}", "--json"]
        answer = coterie("simulate", *tiny_overrides, *given)
        assert answer.code == 0, answer.err
        lines = whole_lines(folder)
        refused.append([line.refused for line in lines])
        vectors.append(load_file(sorted((folder / "checkpoints").iterdir())[-1])["vector"])
        with Store(folder / "ledgers" / "sites.db") as store:
            kinds.append(
                [Counter(e.kind for e in store.ledger(s).entries()) for s in store.sites()]
            )
        for site in answer.json["sites"]:
            away = sum(site["name"] in line.refused for line in lines)
            assert (site["rounds"], site["late"]) == (3, away)
            assert set(site["not_answered"].values()) <= {LATE}
    assert np.array_equal(*vectors)
    assert refused[0] == refused[1]
    assert [len(each) for each in refused[0]] == [2, 2, 2]
    assert kinds[0] == kinds[1]
    assert [each[Kind.RELEASE] for each in kinds[0]] == [3, 3, 3, 3]


def test_plan_and_report_say_that_who_is_late_is_charged(coterie, tiny_overrides, tmp_path):
    settings = (*tiny_overrides, *SETTINGS[:3], "faults.speeds=[1,2]", f"run_dir={tmp_path / 'r'}")
    told = coterie("plan", *settings)
    words = " ".join(told.out.replace("│", " ").split())
    assert "closes with the first 2 updates, and who is later is charged" in words
    assert coterie("plan", *settings, "--json").json["enough_sites"] == 2
    answer = coterie("simulate", *settings, "--json")
    assert answer.code == 0, answer.err
    assert "every site that was asked is charged" in answer.json["privacy"]["private_reason"]
    late = {site["name"]: site["late"] for site in answer.json["sites"]}
    assert late == {"site-1": 2, "site-2": 0, "site-3": 2, "site-4": 0}
    assert len({site["epsilon"] for site in answer.json["sites"]}) == 1
    assert answer.json["faults"]["clock_s"] == 2 * 60 / 2
