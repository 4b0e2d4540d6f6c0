"""Steps that are not finite are skipped and counted; a run that stays so stops and says where."""

import json
import math

import pytest
import torch
from runs import contents, saved, trainer

from klflow_ext.train import NotFinite
from klflow_ext.train.report import BadStep


def poison(run, steps, value=float("inf")):
    """From now on these steps have one bad number in a gradient."""
    plain = run._gradients

    def gradients(*arguments):
        found = plain(*arguments)
        if run.step in steps:
            run.model.embedding.grad.view(-1)[0] = value
        return found

    run._gradients = gradients


def weights(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, value):
    run = trainer(12, tmp_path)
    poison(run, {5, 8}, value)
    before = {}
    plain = run.train_step

    def step():
        if run.step == 5:
            before.update(weights(run), count=run.optimizers[0].state[run.model.embedding]["step"].item())
        loss = plain()
        if run.step == 6:
            assert all(torch.equal(w, before[name]) for name, w in weights(run).items())
            assert run.optimizers[0].state[run.model.embedding]["step"].item() == before["count"]
        return loss

    run.train_step = step
    with pytest.warns(
        UserWarning, match="^loss: got .* in step 6, allowed are finite ones: the step is skipped"
    ) as said:
        run.fit(progress=False)
    assert len(said) == 1
    assert run.step == 12 and run.skipped == 2 and before
    assert [record["skipped"] for record in log_of(tmp_path)] == [0] * 5 + [1] * 3 + [2] * 4
    assert [record["gradient_norm"] is None for record in log_of(tmp_path)] == [i in (5, 8) for i in range(12)]
    assert all(v.isfinite().all() for v in saved(tmp_path)["model"].values())
    again = trainer(12, tmp_path)
    again.load()
    assert again.skipped == 2


def test_a_run_that_stays_bad_stops_and_reports(tmp_path):
    run = trainer(100, tmp_path)
    poison(run, range(10, 100))
    with pytest.raises(
        NotFinite, match=r"loss: got [\d.]+ with a gradient of norm inf in step 30, the last of 20"
    ) as stop:
        run.fit(progress=False)
    state = saved(tmp_path)
    assert state["step"] == 30 and all(v.isfinite().all() for v in state["model"].values())
    assert [record["step"] for record in log_of(tmp_path)] == list(range(1, 31))
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["step"], report["skipped"], report["gradient_norm"]) == (30, 20, "inf")
    assert next(iter(report["modules"].items())) == ("embedding", "inf")
    assert all(isinstance(norm, float) for name, norm in report["modules"].items() if name != "embedding")
    assert report["checkpoint"] == str(next(tmp_path.glob("checkpoint-*-step-30")))
    said = str(stop.value)
    assert "gradient norm by module: embedding inf, " in said and report["checkpoint"] in said and "report.json" in said
    with pytest.raises(NotFinite, match="in step 30"):
        run.train_step()
    again = trainer(100, tmp_path)
    again.load()
    again.config = run.config
    again.train_step()


@pytest.mark.filterwarnings("ignore:loss")
def test_a_run_that_learned_nothing_is_an_error(tmp_path):
    """Also one with fewer steps than end a run."""
    run = trainer(3, tmp_path)
    poison(run, range(3), float("nan"))
    with pytest.raises(NotFinite, match="in step 3, the last of 3 that were skipped"):
        run.fit(progress=False)
    assert json.loads((tmp_path / "report.json").read_text())["skipped"] == 3


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_report_names_the_sequence(tmp_path, accumulate):
    """One sequence has a loss that is not finite; nothing but its number and time stand first."""
    run = trainer(100, tmp_path, accumulate=accumulate)
    plain = run.engine.loss

    def loss(tokens, t, rng, *, reduction, row_offset, **options):
        values = plain(tokens, t, rng, reduction="none", row_offset=row_offset, **options)
        bad = torch.arange(row_offset // 16, row_offset // 16 + len(t)) == 5
        values = torch.where(bad[:, None], values * math.nan, values)
        return values if reduction == "none" else values.sum()

    run.engine.__dict__["loss"] = loss
    with pytest.raises(NotFinite, match=r"the worst first: 5 \(t 0\.\d+, loss nan\), "):
        run.fit(progress=False)
    report = json.loads((tmp_path / "report.json").read_text())
    numbers = [entry["number"] for entry in report["sequences"]]
    assert numbers[0] == 5 and sorted(numbers) == list(range(8))
    assert [entry["loss"] == "nan" for entry in report["sequences"]] == [True] + [False] * 7
    times = run.batches.batch(19).t
    assert [entry["t"] for entry in report["sequences"]] == [times[i].item() for i in numbers]


def test_norms_of_modules_make_the_norm_of_all():
    run = trainer(1)
    batch = run.batches.batch(0)
    run._gradients(batch)
    named = [(name, p.grad) for name, p in run.model.named_parameters()]
    bad = BadStep.of(1, 2.0, 3.0, 1, batch.t, run._losses(batch), named)
    total = torch.nn.utils.get_total_norm([g for _, g in named])
    assert math.sqrt(sum(norm**2 for norm in bad.modules.values())) == pytest.approx(total.item(), rel=1e-5)
    assert list(bad.modules.values()) == sorted(bad.modules.values(), reverse=True)
    losses = torch.tensor([loss for _, _, loss in sorted(bad.sequences)])
    mean = (losses * batch.counts).sum() / batch.counts.sum()
    assert mean.item() == pytest.approx(run._gradients(batch)[0], rel=1e-5)


@pytest.mark.parametrize("where", ["weights", "average", "moments"])
def test_what_is_not_finite_is_never_saved(tmp_path, where):
    run = trainer(3, tmp_path, ema=0.5)
    run.fit(progress=False)
    before = contents(tmp_path)
    moments = run.optimizers[0].state[run.model.embedding]["exp_avg"]
    place = {"weights": run.model.head.weight, "average": run.average["head.weight"], "moments": moments}[where]
    with torch.no_grad():
        place[3, 3] = float("nan")
    with pytest.raises(
        ValueError, match=r"got numbers that are not finite, which are never saved; the last checkpoint is"
    ):
        run.save()
    assert contents(tmp_path) == before


def test_weights_that_turn_bad_leave_the_last_checkpoint(tmp_path):
    run = trainer(100, tmp_path)
    run.save()
    before = {name: data for name, data in contents(tmp_path).items() if name.startswith("checkpoint")}
    with torch.no_grad():
        run.model.head.weight[3, 3] = float("nan")
    with pytest.raises(NotFinite, match="not saved: head.weight: got numbers that are not finite") as stop:
        run.fit(progress=False)
    after = {name: data for name, data in contents(tmp_path).items() if name.startswith("checkpoint")}
    assert after == before and "checkpoint-0001-step-0" in str(stop.value)
