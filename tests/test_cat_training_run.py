"""A pre-training run: resuming, parts of a batch, what is computed, what is written, stopping early."""

import csv
import math
import signal
from dataclasses import replace

import pytest
import torch
from cat_training_cases import RUN, SETTINGS, TINY, describe, read_tone, short_run, tones
from safetensors.torch import load_file

import cat_encoder
from cat_encoder.errors import CatError
from cat_encoder.training import log
from cat_encoder.training.commands import stop_between_updates
from cat_encoder.training.data import Sounds
from cat_encoder.training.log import RunLog
from cat_encoder.training.pretrain import Pretraining, open_pretraining
from cat_encoder.training.run import Run, Step
from cat_encoder.training.teacher import DecaySchedule

FILES = ("encoder.safetensors", "teacher.safetensors", "resume.safetensors")


class Stop(BaseException):
    pass


def stop_at(update):
    def on_step(step):
        if step.update == update:
            raise Stop

    return on_step


def assert_same_files(one, other):
    for name in FILES:
        left, right = load_file(one / name), load_file(other / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name
    assert (one / "log.csv").read_bytes() == (other / "log.csv").read_bytes()


# Resuming


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    short_run(folder)
    return folder


@pytest.mark.parametrize("update", [1, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(uninterrupted, tmp_path, update):
    with pytest.raises(Stop):
        short_run(tmp_path, on_step=stop_at(update))
    torch.manual_seed(99)  # whatever the process drew meanwhile
    torch.randn(7)
    short_run(tmp_path)
    assert_same_files(uninterrupted, tmp_path)


def test_a_run_killed_after_its_last_save_repeats_the_lost_updates(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "save", save_once(Run.save))  # the save at update 2 works, then the power fails
    with pytest.raises(OSError):
        short_run(tmp_path, run=replace(RUN, save_every=2))
    monkeypatch.undo()
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 5
    short_run(tmp_path, run=replace(RUN, save_every=2))
    assert_same_files(uninterrupted, tmp_path)


def save_once(save):
    done = []

    def saving(self):
        if done:
            raise OSError("no power")
        done.append(save(self))

    return saving


def test_a_finished_run_is_only_written_again(uninterrupted):
    before = {name: load_file(uninterrupted / name) for name in FILES}
    short_run(uninterrupted, on_step=stop_at(1))
    for name, tensors in before.items():
        assert all(torch.equal(tensor, load_file(uninterrupted / name)[key]) for key, tensor in tensors.items())


def test_restart_begins_anew(uninterrupted, tmp_path):
    short_run(tmp_path, run=replace(RUN, seed=8))
    short_run(tmp_path, resume=False)
    assert_same_files(uninterrupted, tmp_path)


def test_other_settings_are_refused_on_resume(tmp_path):
    with pytest.raises(Stop):
        short_run(tmp_path, on_step=stop_at(1))
    with pytest.raises(CatError, match=r"run\.rate was 0\.001, is 0\.002.*another folder"):
        short_run(tmp_path, run=replace(RUN, rate=0.002))
    with pytest.raises(CatError, match="pretrain.clones"):
        short_run(tmp_path, settings=replace(SETTINGS, clones=3))
    short_run(tmp_path, run=replace(RUN, accumulate=2, save_every=3))  # these may change


def test_a_damaged_state_is_a_sentence(tmp_path):
    short_run(tmp_path, run=replace(RUN, updates=1))
    state = tmp_path / "resume.safetensors"
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(CatError, match="cannot be read as the state of a run"):
        short_run(tmp_path)


def test_the_global_generator_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    short_run(tmp_path, run=replace(RUN, updates=1))
    assert torch.equal(torch.randn(3), expected)


# What is computed


def make_run(folder, run=RUN, settings=SETTINGS):
    return open_pretraining(tones(10), folder, architecture=TINY, settings=settings, run=run, external=describe, read=read_tone, shortest=1000)


def first_batch(size):
    return next(Sounds(tones(10), read_tone, SETTINGS.frames, shortest=1000, seed=RUN.seed).batches(0, 1, size))


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulated_parts_are_one_big_batch(tmp_path, parts):
    gradients, numbers = [], []
    for count in (1, parts):
        run = make_run(tmp_path, replace(RUN, batch=8, accumulate=count, clip=0.0))
        numbers.append(run.step(first_batch(8)).numbers)
        gradients.append({name: parameter.grad for name, parameter in run.task.model.named_parameters()})
    for name, whole in gradients[0].items():
        assert (gradients[1][name] - whole).norm() <= 1e-5 * whole.norm() + 1e-7, name
    for name in ("loss", "frame", "utterance", "alignment", "gradient"):
        assert numbers[1][name] == pytest.approx(numbers[0][name], rel=1e-5)


def test_clips_are_pushed_through_the_stem_once_per_model(tmp_path):
    run = make_run(tmp_path)
    calls = []
    for name, encoder in (("student", run.task.model.encoder), ("teacher", run.task.teacher.encoder)):
        encoder.stem.register_forward_pre_hook(lambda _, given, name=name: calls.append((name, len(given[0]), None if given[1] is None else len(given[1]))))
    run.step(first_batch(4))
    assert sorted(calls) == [("student", 4, 8), ("teacher", 4, None)]  # 2 masks per clip; no unmasked pass of the student


def test_the_norm_of_the_gradient_is_limited(tmp_path):
    run = make_run(tmp_path, replace(RUN, clip=0.01))
    step = run.step(first_batch(4))
    total = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in run.task.model.parameters()))
    assert total == pytest.approx(0.01, rel=1e-3) and step.numbers["gradient"] > 0.1


def test_optimisers_differ_in_what_decays(tmp_path):
    for kind, exempt in (("paper", False), ("adamw", True)):
        run = make_run(tmp_path, replace(RUN, optimiser=kind))
        decays = {id(parameter): group["weight_decay"] for group in run.optimiser.param_groups for parameter in group["params"]}
        encoder = run.task.model.encoder
        assert decays[id(encoder.blocks[0].qkv.weight)] == 0.05
        for parameter in (encoder.blocks[0].qkv.bias, encoder.norm.weight, encoder.class_token):
            assert decays[id(parameter)] == (0.0 if exempt else 0.05)
        assert len(decays) == len(list(run.task.model.parameters()))


def test_half_precision_learns_about_the_same(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        run = make_run(tmp_path, replace(RUN, precision=precision))
        losses[precision] = [run.step(first_batch(4)).numbers["loss"] for _ in range(4)]
        assert all(parameter.dtype == torch.float32 for parameter in run.task.model.parameters())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03) and losses["bf16"] != losses["fp32"]


def test_without_an_outside_encoder_there_is_no_head(tmp_path):
    short_run(tmp_path, external=None)
    assert not any("alignment" in name for name in load_file(tmp_path / "resume.safetensors"))
    assert {float(row["alignment"]) for row in csv.DictReader((tmp_path / "log.csv").open())} == {0.0}


# What is written


def test_the_encoder_can_be_loaded(uninterrupted):
    sound = torch.cat([read_tone(clip.path)[0] for clip in tones(2)])[:, None]
    state = load_file(uninterrupted / "resume.safetensors")
    for name, prefix in (("encoder", "model.encoder."), ("teacher", "teacher.")):
        ear = cat_encoder.load(uninterrupted / f"{name}.safetensors")
        assert ear.frames == SETTINGS.frames and not ear.has_head
        assert ear.features(sound, 16_000).tokens.shape[0] == 2
        stored = ear.trunk.state_dict()
        assert all(torch.equal(stored[key], state[prefix + key]) for key in stored)


def test_the_log_has_a_row_per_update(uninterrupted):
    rows = list(csv.DictReader((uninterrupted / "log.csv").open()))
    assert [int(row["update"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [float(row["rate"]) for row in rows][:3] == [0.0, 5e-4, 1e-3]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert not list(uninterrupted.glob("*.part"))


def test_a_new_number_gets_a_column(tmp_path):
    rows = log.RunLog(tmp_path)
    rows.write({"update": 1, "loss": 2.0})
    rows.write({"update": 2, "loss": 1.0, "mAP": 0.5})
    assert (tmp_path / "log.csv").read_text().splitlines() == ["update,loss,mAP", "1,2.0,", "2,1.0,0.5"]


def test_a_log_that_is_cut_off_or_none(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("update,loss\r\n1,0.5\r\n2,0.4\r\n3", encoding="utf-8")
    RunLog(tmp_path, update=9).write({"update": 10, "loss": 0.1})
    assert log.read_text(encoding="utf-8").split() == ["update,loss", "1,0.5", "2,0.4", "10,0.1"]
    log.write_text("name,price\r\ntea,2\r\n", encoding="utf-8")
    with pytest.raises(CatError, match="is no log of a run .*name, price"):
        RunLog(tmp_path)
    assert "tea" in log.read_text(encoding="utf-8")


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(CatError, match="TensorBoard is not installed.*log.csv"):
        short_run(tmp_path, run=replace(RUN, tensorboard=True))


def test_tensorboard_shows_what_the_log_says(tmp_path):
    """Also behind a stop: the curves of updates that are made again are not drawn twice."""
    accumulate = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    with pytest.raises(Stop):
        short_run(tmp_path, run=replace(RUN, tensorboard=True), on_step=stop_at(4))
    short_run(tmp_path, run=replace(RUN, tensorboard=True))
    curves = accumulate(str(tmp_path / "tensorboard")).Reload()
    with (tmp_path / "log.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert set(curves.Tags()["scalars"]) == rows[0].keys() - {"update"}
    for name in curves.Tags()["scalars"]:
        drawn = {event.step: event.value for event in curves.Scalars(name)}
        assert drawn == pytest.approx({int(row["update"]): float(row[name]) for row in rows}, rel=1e-6), name
        assert len(curves.Scalars(name)) == len(rows)


# Stopping


def test_a_step_that_was_cut_off_is_not_saved(uninterrupted, tmp_path, monkeypatch):
    def cut_off(self, update):
        if update == 3:
            raise KeyboardInterrupt  # the weights have moved, the teacher has not

    monkeypatch.setattr(Pretraining, "follow", wrap(Pretraining.follow, cut_off))
    with pytest.raises(KeyboardInterrupt):
        short_run(tmp_path, run=replace(RUN, save_every=2))
    monkeypatch.undo()
    short_run(tmp_path, run=replace(RUN, save_every=2))
    assert_same_files(uninterrupted, tmp_path)


def wrap(method, before):
    def wrapped(self, update):
        before(self, update)
        method(self, update)

    return wrapped


@pytest.fixture
def ctrl_c():
    """Ctrl-C as on a terminal: a process started in the background may have been told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_update_and_saves(ctrl_c, tmp_path):
    with stop_between_updates() as check:

        def on_step(step: Step):
            if step.update == 2:
                signal.raise_signal(signal.SIGINT)
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a second one acts at once
            check(step)

        with pytest.raises(KeyboardInterrupt):
            short_run(tmp_path, on_step=on_step)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3
    updates = []
    short_run(tmp_path, on_step=lambda step: updates.append(step.update))
    assert updates == [3, 4, 5, 6]


def test_a_loss_that_is_no_number_stops_with_a_sentence(tmp_path):
    with pytest.raises(CatError, match=r"The (loss|gradient) of update \d is (nan|inf).*Lower the learning rate \(now at most 1e\+30\).*\.wav"):
        short_run(tmp_path, run=replace(RUN, rate=1e30, warmup=0, clip=0.0))
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "resume.safetensors").values())


def test_reading_threads_end_with_the_run(tmp_path):
    import threading

    before = threading.active_count()
    with pytest.raises(Stop):
        short_run(tmp_path, on_step=stop_at(1))
    assert threading.active_count() == before


def test_decay_rises_over_a_quarter_of_the_run_by_default(tmp_path):
    run = make_run(tmp_path, replace(RUN, updates=400), replace(SETTINGS, ema=None))
    assert run.task.teacher.schedule == DecaySchedule(0.9998, 0.99999, 100)


@pytest.mark.parametrize(
    "changes", [{"batch": 0}, {"updates": 0}, {"accumulate": -1}, {"rate": -1.0}, {"optimiser": "sgd"}, {"precision": "int8"}, {"log_every": 0}]
)
def test_settings_that_cannot_be_are_a_sentence(changes):
    with pytest.raises(CatError, match=f"cannot be used: .*{next(iter(changes))}"):
        replace(RUN, **changes)
