"""The contract of a task: whoever adds one file and one line gets all of this for it."""

import numpy as np
import pytest
import torch

from client.ledger import Store
from client.train import Trainer
from common import parameters
from common.config import TaskName
from common.model import TARGET, read_of, targets_of
from common.parameters import Layout
from common.tasks import TASKS, build_model

from .toy import losses_around_a_round, one_round, toy_config

RECORDS = 6


def test_there_are_tasks_and_each_name_has_one():
    """An empty list would make the whole suite below pass by testing nothing."""
    assert TASKS
    assert set(TASKS) == set(TaskName)
    assert {name for name in TASKS if TASKS[name].CLASSES} == {n for n in TaskName if n.has_classes}


@pytest.fixture(scope="module", params=list(TASKS), ids=lambda name: name.name)
def config(request, tiny_config, tmp_path_factory):
    return toy_config(request.param, tiny_config, tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def task(config):
    return TASKS[config.task.name]


@pytest.fixture(scope="module")
def processor(task, config):
    return task.load_processor(config.model)


@pytest.fixture(scope="module")
def encoded(task, processor, config):
    return task.encode(processor, task.toy_examples(RECORDS), config.task)


@pytest.fixture(scope="module")
def model(config):
    """With parameters moved off zero, where a fresh head gives everything the same answer."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def losses(task, model, inputs):
    with torch.no_grad():
        return task.loss_vector(model(**read_of(inputs)), targets_of(inputs))


def rows(inputs, chosen):
    return {name: tensor[chosen] for name, tensor in inputs.items()}


def test_loss_has_one_finite_entry_a_record(task, model, encoded):
    loss = losses(task, model, encoded)
    assert loss.shape == (RECORDS,)
    assert torch.isfinite(loss).all()
    assert len({round(float(each), 5) for each in loss}) > 1


def test_loss_of_a_record_does_not_change_with_the_others(task, model, encoded):
    """Clipping bounds one record's influence only if no other record is in its loss."""
    whole = losses(task, model, encoded)
    for record in range(RECORDS):
        alone = losses(task, model, rows(encoded, [record]))
        assert alone[0] == pytest.approx(float(whole[record]), rel=1e-4, abs=1e-5)
    mixed = losses(task, model, rows(encoded, [3, 0, 0]))
    assert mixed.tolist() == pytest.approx([float(whole[i]) for i in (3, 0, 0)], rel=1e-4, abs=1e-5)


def test_loss_of_a_record_does_not_change_with_the_targets_of_others(task, model, encoded):
    output = model(**read_of(encoded)).detach()
    targets = targets_of(encoded)
    assert targets
    whole = task.loss_vector(output, targets)
    for record in range(RECORDS):
        others = {name: tensor.clone() for name, tensor in targets.items()}
        for tensor in others.values():
            kept = tensor[record].clone()
            tensor[:] = tensor[torch.arange(RECORDS - 1, -1, -1)].clone()
            tensor[record] = kept
        assert task.loss_vector(output, others)[record] == pytest.approx(float(whole[record]))


def test_gradient_of_a_records_loss_reaches_its_output_only(task, model, encoded):
    output = model(**read_of(encoded)).detach().requires_grad_()
    task.loss_vector(output, targets_of(encoded))[2].backward()
    touched = output.grad.reshape(RECORDS, -1).abs().sum(1) > 0
    assert touched.tolist() == [record == 2 for record in range(RECORDS)]


def test_no_record_gives_an_empty_loss(task, model, encoded):
    """A Poisson sample may be empty, and the step goes on; the model itself is not run."""
    output = model(**read_of(encoded)).detach()
    targets = {name: tensor[:0] for name, tensor in targets_of(encoded).items()}
    assert task.loss_vector(output[:0], targets).shape == (0,)


def test_sizes_do_not_depend_on_the_records(task, processor, config, encoded):
    """A width that follows the longest record would tell of it, and of the batch."""
    examples = task.toy_examples(40)
    shortest = min(range(40), key=lambda i: np.size(examples.contents[i][0]))
    for chosen in ([shortest], [0, 1], [*range(40)]):
        some = task.encode(processor, examples.subset(chosen), config.task)
        assert {*some} == {*encoded}
        for name, tensor in some.items():
            assert tensor.shape == (len(chosen), *encoded[name].shape[1:])


def test_encoding_of_a_record_does_not_change_with_the_others(task, processor, config, encoded):
    alone = task.encode(processor, task.toy_examples(RECORDS).subset([2]), config.task)
    for name, tensor in alone.items():
        assert torch.equal(tensor[0], encoded[name][2])


def test_made_records_are_like_encoded_ones_and_always_the_same(task, processor, config, encoded):
    made, again = (task.made(processor, 5, config) for _ in range(2))
    assert {*made} == {*encoded}
    for name, tensor in made.items():
        assert tensor.shape == (5, *encoded[name].shape[1:])
        assert tensor.dtype == encoded[name].dtype
        assert torch.equal(tensor, again[name])


def test_toy_examples_are_always_the_same_and_differ_from_each_other(task):
    first, again = task.toy_examples(20), task.toy_examples(30)
    assert first.identities() == again.identities()[:20]
    assert len({*first.identities()}) > 10
    assert (first.labels == again.labels[:20]).all()
    assert (len({*first.labels.tolist()}) > 1) == task.CLASSES


def test_prepared_records_give_the_loss_of_raw_ones(task, model, encoded):
    assert losses(task, model, model.prepare(encoded, batch=4)).tolist() == pytest.approx(
        losses(task, model, encoded).tolist(), rel=1e-4, abs=1e-5
    )


def test_a_model_is_saved_and_restored_with_the_answers_it_gave(
    task, config, processor, encoded, tmp_path
):
    built = build_model(config)
    draw = np.random.default_rng(2)
    size = Layout.of(built).size
    parameters.load(built, (0.2 * draw.normal(size=size)).astype(np.float32))
    before = losses(task, built.eval(), encoded)
    task.save(built, tmp_path, {"task": config.task.name.name, "feature_scale": 4.0})
    processor.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]
    import json

    settings = json.loads((tmp_path / "config.json").read_text())
    restored = task.restore(tmp_path, settings).eval()
    after = losses(task, restored, encoded)
    assert after.tolist() == pytest.approx(before.tolist(), rel=1e-3, abs=1e-4)


def test_metrics_have_names_and_are_finite(task, processor, model, encoded, config):
    with torch.no_grad():
        scores = task.score(model, encoded)
    assert all(len(tensor) == RECORDS for tensor in scores.values())
    metrics = task.metrics(scores, task.toy_examples(RECORDS), processor, config)
    assert metrics
    assert all(isinstance(value, float) and np.isfinite(value) for value in metrics.values())


def test_targets_are_what_the_model_does_not_read(encoded):
    assert {*targets_of(encoded)} == {name for name in encoded if name.startswith(TARGET)}
    assert read_of(encoded)


def test_preflight_finds_an_exact_engine_of_ours(config):
    verdict = Trainer(config).preflight(precision=torch.float64)
    assert verdict.engine is not None, verdict.refused
    assert verdict.engine.name.name == "single_backward", verdict.refused
    assert verdict.max_rel_error <= 1e-5


def test_adapters_sit_on_queries_and_values_with_no_target_named(config):
    """Models call them otherwise; nobody should have to look a name up to use the default."""
    assert config.tuning.targets == []
    names = Layout.of(build_model(config)).names
    modules = {name.split(".lora_")[0].split(".")[-1] for name in names if "lora_" in name}
    assert modules in ([{"query", "value"}, {"q_proj", "v_proj"}, {"q", "v"}, {"c_attn"}])


def test_a_federated_private_round_lowers_the_loss_of_the_released_model(config, tmp_path):
    """The whole way, on which nothing knows the task but by its protocol."""
    one = one_round(config, tmp_path)
    before, after = losses_around_a_round(one)
    assert after < before
    with Store(tmp_path / "run" / "ledgers" / "sites.db") as store:
        kinds = [entry.kind.name for entry in store.ledger("site-1").entries()]
    assert "RELEASE" in kinds
