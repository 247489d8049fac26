"""Records prepared once or anew at each use: the same training, and nothing kept in the second."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from client.site import Site
from client.train import Trainer
from common import prepared
from common.config import NoiseSource, PrivacyMode, TuningMethod
from common.parameters import flatten
from common.prepared import Preparation, PreparedRecords
from common.records import Records
from common.tasks import TASKS, build_model
from server.evaluate import Evaluator
from tests.common.toy import TINY, toy_config

RECORDS = 40


@pytest.fixture(autouse=True)
def empty_shelves(monkeypatch):
    monkeypatch.setattr(prepared, "_SHELVES", {})


@pytest.fixture(scope="module", params=list(TINY), ids=lambda name: name.value)
def config(request, tiny_config, tmp_path_factory):
    return seeded(toy_config(request.param, tiny_config, tmp_path_factory.mktemp("toy")))


def seeded(config):
    return replace(config, privacy=replace(config.privacy, noise=NoiseSource.seeded))


def with_engine(config, **changes):
    return replace(config, engine=replace(config.engine, **changes))


def prepared_of(config, records, declared=RECORDS):
    return PreparedRecords(records, preparation_of(config), declared=declared)


def preparation_of(config):
    processor = TASKS[config.task.name].load_processor(config.model)
    return Preparation(config, build_model(config), processor, config.engine.physical_batch)


def records_of(config):
    return TASKS[config.task.name].toy_examples(RECORDS)


def trained(config, records):
    trainer = Trainer(config)
    vector = flatten(build_model(config))
    for number in (1, 2):
        vector, _ = trainer.train(Site("site", records, (), None), vector, round_number=number)
    return vector


def test_rows_are_the_same_kept_or_not(config):
    """To the bit, in any order and number."""
    records = records_of(config)
    kept = prepared_of(config, records)
    anew = prepared_of(with_engine(config, cache_mb=0), records)
    assert (kept.kept, anew.kept) == (True, False)
    for at in ([0], [3, 1, 3], range(RECORDS)):
        rows, others = (each.rows(np.array(at)) for each in (kept, anew))
        assert rows.keys() == others.keys()
        for name, tensor in rows.items():
            assert len(tensor) == len(at)
            assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("at", [range(RECORDS), range(RECORDS - 1), [1, 0, *range(2, RECORDS)], []])
def test_rows_that_are_lent_are_those_that_would_be_copied(config, at):
    prepared_records, at = prepared_of(config, records_of(config)), np.array(at, dtype=np.int64)
    lent, rows = prepared_records.lent(at), prepared_records.rows(at)
    assert lent.keys() == rows.keys()
    assert all(torch.equal(lent[name], rows[name]) for name in rows)


def test_all_rows_in_order_are_lent_without_a_copy_and_others_are_not(config):
    different = records_of(config).subset(first_of_each(records_of(config)))
    count = len(different)
    prepared_records = prepared_of(config, different)
    one, two = (prepared_records.lent(np.arange(count)) for _ in range(2))
    assert all(one[name].data_ptr() == two[name].data_ptr() for name in one)
    part = prepared_records.lent(np.arange(count - 1))
    assert all(one[name].data_ptr() != part[name].data_ptr() for name in one)


def first_of_each(records):
    """Of records of which some are equal: those lie in one place."""
    digests = [each.tobytes() for each in records.digests()]
    return np.array(sorted({key: at for at, key in reversed([*enumerate(digests)])}.values()))


def test_training_is_the_same_kept_or_not(config):
    records = records_of(config)
    for batch in (1, 16, 48):
        config = with_engine(config, physical_batch=batch)
        kept = trained(config, records)
        assert np.array_equal(kept, trained(with_engine(config, cache_mb=0), records))
        assert np.abs(kept - flatten(build_model(config))).max() > 0


@pytest.mark.parametrize("method", TuningMethod, ids=lambda method: method.value)
def test_it_is_in_every_way_of_tuning(method, tiny_config):
    tuning = replace(tiny_config.tuning, method=method, adapter_learning_rate=0.1)
    config = seeded(replace(tiny_config, tuning=tuning))
    records = records_of(config)
    assert np.array_equal(
        trained(config, records), trained(with_engine(config, cache_mb=0), records)
    )


def test_it_is_without_privacy_and_by_person(tiny_config, person_config):
    records = records_of(tiny_config)
    owned = replace(records, persons=tuple(f"p{n // 4}" for n in range(RECORDS)))
    none = replace(tiny_config, privacy=replace(tiny_config.privacy, mode=PrivacyMode.none))
    for each, of in ((none, records), (person_config, owned)):
        config = seeded(each)
        assert np.array_equal(trained(config, of), trained(with_engine(config, cache_mb=0), of))


def test_evaluation_is_the_same_kept_or_not(config):
    records, vector = records_of(config), flatten(build_model(config))
    found = [
        Evaluator(each, build_model(each), records).measure(vector)
        for each in (config, with_engine(config, cache_mb=0))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_step_without_a_cache_encodes_who_was_drawn_and_nobody_else(tiny_config, monkeypatch):
    config = with_engine(seeded(tiny_config), cache_mb=0)
    records, task, read = records_of(config), TASKS[config.task.name], []
    encode = type(task).encode
    monkeypatch.setattr(
        type(task),
        "encode",
        lambda task, processor, some, settings: (
            read.append(len(some)) or encode(task, processor, some, settings)
        ),
    )
    trained(config, records)
    steps = 2 * config.federation.local_steps
    assert 0 < sum(read) < RECORDS * steps
    assert max(read) <= config.engine.physical_batch
    read.clear()
    trained(with_engine(config, cache_mb=2048), records)
    assert sum(read) == RECORDS


def test_the_choice_follows_from_the_config_and_not_from_records(tiny_config):
    """What is done must tell nothing of a site; that it has many records, say."""
    config = with_engine(tiny_config, cache_mb=1)
    preparation = preparation_of(config)
    most = prepared.MIB // preparation.row_bytes
    assert preparation.keeps(most)
    assert not preparation.keeps(most + 1)
    for declared, kept in ((most, True), (most + 1, False)):
        told = replace(config, data=replace(config.data, declared_records=declared))
        for records in (3, RECORDS):
            trainer = Trainer(told)
            site = Site("site", records_of(config).subset(range(records)), (), None)
            assert trainer._prepared(site).prepared.kept is kept


def test_a_made_record_is_as_large_as_any(config):
    """Else the budget would be of something else."""
    rows = prepared_of(config, records_of(config)).rows(np.arange(RECORDS))
    whole = sum(tensor.numel() * tensor.element_size() for tensor in rows.values())
    assert whole == RECORDS * preparation_of(config).row_bytes


def test_more_records_than_are_prepared_at_once_are_all_there(tiny_config, monkeypatch):
    monkeypatch.setattr(prepared, "AT_ONCE", 7)
    config, records = with_engine(tiny_config, physical_batch=5), records_of(tiny_config)
    whole = prepared_of(config, records).rows(np.arange(RECORDS))
    for index in range(RECORDS):
        alone = prepared_of(config, records.subset([index])).rows(np.array([0]))
        for name, tensor in alone.items():
            assert torch.allclose(tensor[0], whole[name][index], rtol=1e-5, atol=1e-6)


def test_a_site_without_records_takes_its_steps(tiny_config):
    for cache in (0, 2048):
        config = with_engine(seeded(tiny_config), cache_mb=cache)
        assert np.isfinite(trained(config, records_of(config).subset([]))).all()


def encoded(monkeypatch):
    """How many records are encoded from now on, call by call."""
    seen, subset = [], Records.subset

    def counted(records, indices):
        seen.append(len(indices))
        return subset(records, indices)

    monkeypatch.setattr(Records, "subset", counted)
    return seen


def test_a_second_run_prepares_nothing_that_the_first_did(config, monkeypatch):
    """Whatever site a record is dealt to; and its rows are those of the first run."""
    records = records_of(config)
    first, seen = prepared_of(config, records), encoded(monkeypatch)
    dealt = records.subset([*range(RECORDS - 1, 9, -1)])
    seen.clear()
    second = prepared_of(replace(config, seed=config.seed + 1), dealt)
    assert sum(seen) == 0
    expected, found = first.rows(np.array([39, 12])), second.rows(np.array([0, 27]))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_another_label_task_or_frozen_weight_is_prepared_anew(tiny_config, monkeypatch):
    config = seeded(tiny_config)
    records = records_of(config)
    prepared_of(config, records)
    seen = encoded(monkeypatch)
    prepared_of(config, replace(records, labels=1 - records.labels))
    assert sum(seen) == len(records)
    seen.clear()
    prepared_of(replace(config, task=replace(config.task, max_tokens=11)), records)
    assert sum(seen) == len(records)
    seen.clear()
    changed = preparation_of(config)
    with torch.no_grad():
        next(p for p in changed.model.parameters() if not p.requires_grad).add_(1.0)
    PreparedRecords(records, changed, declared=RECORDS)
    assert sum(seen) == len(records)


def test_shelves_hold_no_more_than_they_may():
    def filled_shelf(name, keys):
        shelf = prepared.shelf_of(name, keys, row=40, most=400)
        shelf.put([key for key in keys if key not in shelf], {"x": torch.zeros(len(keys), 10)})
        return shelf

    first = filled_shelf(b"a", [b"1", b"2", b"3"])
    second = filled_shelf(b"b", [b"1", b"2", b"3", b"4"])
    assert prepared.shelf_of(b"a", [b"1", b"2", b"3"], row=40, most=400) is first
    filled_shelf(b"c", [b"1", b"2", b"3", b"4"])
    assert [*prepared._SHELVES] == [b"a", b"c"]  # b had not been used for longest
    assert second.rows([0, 3])["x"].shape == (2, 10)  # who holds it still reads it
    assert (
        prepared.shelf_of(b"a", [str(n).encode() for n in range(20, 29)], row=40, most=400)
        is not first
    )
    assert sum(shelf.bytes for shelf in prepared._SHELVES.values()) <= 400


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_model_folder_that_changed_under_its_name_is_prepared_anew(name, tiny_config, tmp_path):
    """Its weights may be the same: words and settings decide what a row is, too."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_config.model.name, folder)
    config = replace(tiny_config, model=replace(tiny_config.model, name=str(folder)))
    config = replace(config, tuning=replace(config.tuning, method=TuningMethod.head))
    records, at = records_of(config), np.arange(RECORDS)
    before = prepared_of(config, records).rows(at)
    settings = json.loads((folder / name).read_text())
    if name == "config.json":
        settings["hidden_act"] = "relu"
    else:
        words = settings["model"]["vocab"]
        words["goal"], words["bank"] = words["bank"], words["goal"]
    (folder / name).write_text(json.dumps(settings))
    after = prepared_of(config, records).rows(at)
    prepared._SHELVES.clear()
    anew = prepared_of(config, records).rows(at)
    assert torch.equal(after["pooled"], anew["pooled"])
    assert not torch.equal(after["pooled"], before["pooled"])


def test_a_processor_is_the_same_after_it_was_used(tiny_config):
    """Tokenizers write into what they save how they last padded."""
    config, records = seeded(tiny_config), records_of(tiny_config)
    processor = TASKS[config.task.name].load_processor(config.model)
    for some in (records.subset([0]), records.subset([1])):
        preparation = Preparation(config, build_model(config), processor, 16)
        PreparedRecords(some, preparation, declared=RECORDS)
    assert len(prepared._SHELVES) == 1


def test_a_model_is_told_from_others_once_and_not_for_each_site(tiny_config, monkeypatch):
    """A thousand sites would hash its weights a thousand times."""
    told, digest_of = [], prepared._digest_of
    monkeypatch.setattr(prepared, "_digest_of", lambda p: told.append(p) or digest_of(p))
    trainer = Trainer(tiny_config)
    for number in range(3):
        trainer._prepared(Site(f"site-{number}", records_of(tiny_config), (), None))
    assert len(told) == 1
