"""The page in Chromium: what a person sees of a session and does with it, against what the server itself says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from axe_playwright_python.base import AXE_FILE_PATH

from ntm import Client
from tests import step_models
from tests.conftest import ROOT, ServerProcess
from tests.inspector.conftest import Page, inspecting, saved

COLOURS = json.loads((ROOT / "inspector" / "static" / "colours.json").read_text())["light"]


def values(
    pixels: list[list[int]], name: str, low: float, high: float, count: int = 256
) -> npt.NDArray[np.float64]:
    """The numbers that pixels stand for, by the nearest of a colour map's colours."""
    stops = np.array([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in COLOURS[name]], np.float64)
    places = np.linspace(0, len(stops) - 1, count)
    ramp = np.stack([np.interp(places, range(len(stops)), stops[:, i]) for i in range(3)], axis=1)
    packed = np.array(pixels)
    colours = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=-1)
    nearest = ((colours[..., np.newaxis, :] - ramp) ** 2).sum(axis=-1).argmin(axis=-1)
    return low + nearest / (count - 1) * (high - low)


def shown_memory(
    page: Page, state: npt.NDArray[np.float32], least: float, most: float
) -> npt.NDArray[np.float64]:
    """The memory that is drawn, whose colours stand for numbers up to the farthest from 0."""
    farthest = max(abs(least), abs(most))
    read = values(page.pixels("#memory"), "signed", -farthest, farthest, 255)
    assert read.shape == state.shape
    return read


def states_by_hand(address: str, length: int, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """The copy model's states after each step of the same sequence, each read by a GetState of its own."""
    inputs = np.zeros((2 * length + 1, 9), np.float32)
    inputs[:length, :8] = np.random.default_rng(seed).integers(0, 2, (length, 8))
    inputs[length, 8] = 1
    with Client(address) as client, client.session("copy") as session:
        states = [session.state()]
        for step in inputs:
            session.step(step)
            states.append(session.state())
    return {name: np.stack([state[name] for state in states]) for name in states[0]}


def test_the_copy_of_20_vectors_is_seen_as_a_diagonal_of_write_attention(page: Page, served: str) -> None:
    page.create()
    page.load("copy", length=20, seed=0)

    page.run(41)

    assert "0 of 160 bits wrong" in page.page.locator("#sequence-about").inner_text()
    expected = states_by_hand(served, 20)["write_weightings"][1:, 0, :].T
    page.page.uncheck("#show-used")
    drawn = values(page.pixels("canvas[data-lane='write_weightings.0']"), "write", 0, 1)
    np.testing.assert_allclose(drawn, expected, atol=0.01)
    places = drawn[:, :20].argmax(axis=0)
    steps = np.diff(places) % 128
    assert len(set(steps)) == 1
    assert steps[0] in (1, 127)


def test_the_rows_in_use_are_a_straight_diagonal(page: Page, served: str) -> None:
    page.create()
    page.load("copy", length=20, seed=0)
    page.run(41)

    lane = "canvas[data-lane='write_weightings.0']"
    rows = [int(row) for row in page.page.locator(lane).get_attribute("data-rows").split()]
    drawn = values(page.pixels(lane), "write", 0, 1)

    expected = states_by_hand(served, 20)["write_weightings"][1:, 0, :].T
    np.testing.assert_allclose(drawn, expected[rows], atol=0.01)
    assert set(np.flatnonzero(expected.max(axis=1) >= 0.1)) == set(rows)
    assert set(np.diff(drawn[:, :20].argmax(axis=0))) == {-1}


def test_the_memory_is_drawn_as_it_was_at_every_moment_that_is_scrubbed_to(page: Page, served: str) -> None:
    page.create()
    page.load("copy", length=5, seed=0)
    page.run(11)
    states = states_by_hand(served, 5)
    memory = states["memory"]
    slider = page.page.locator("#scrub")
    slider.focus()
    for key, moment in [
        ("ArrowLeft", 10),
        ("PageDown", 0),
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("End", 11),
        ("Home", 0),
    ]:
        page.page.keyboard.press(key)
        page.drawn(moment)
        drawn = shown_memory(page, memory[moment], memory.min(), memory.max())
        np.testing.assert_allclose(drawn, memory[moment], atol=0.03)
        beside = values(page.pixels("canvas[data-head='read_weightings.0']"), "read", 0, 1)
        np.testing.assert_allclose(beside[:, 0], states["read_weightings"][moment, 0], atol=0.01)
        assert slider.get_attribute("aria-valuenow") == str(moment)

    box = slider.bounding_box()
    page.page.mouse.move(box["x"] + 2, box["y"] + 20)
    page.page.mouse.down()
    page.drawn(1)
    page.page.mouse.move(box["x"] + box["width"] * 7.5 / 11, box["y"] + 20)
    page.drawn(8)
    page.page.mouse.up()
    np.testing.assert_allclose(
        shown_memory(page, memory[8], memory.min(), memory.max()), memory[8], atol=0.03
    )


def test_a_fork_at_step_10_is_what_the_session_was_there(page: Page, served: str) -> None:
    page.create()
    page.load("copy", length=20, seed=0)
    page.run(41)
    source = page.page.locator("#session-id").inner_text()
    page.page.locator("#scrub").focus()
    page.page.keyboard.press("Home")
    page.page.keyboard.press("PageUp")
    page.drawn(10)

    page.page.click("#fork")
    fork = page.other_session(source)

    states = states_by_hand(served, 20)
    with Client(served) as client:
        session = client.attach(fork)
        assert session.next_step == 10
        for name, array in session.state().items():
            np.testing.assert_array_equal(array, states[name][10], err_msg=name)
    page.drawn(10)


def test_two_sessions_are_compared_number_by_number(page: Page, served: str) -> None:
    first = page.create()
    page.load("copy", length=5, seed=0)
    page.run(11)
    second = page.create()
    page.load("copy", length=5, seed=1)
    page.run(11)

    page.page.select_option("#compare-with", first)
    page.until("document.getElementById('compare-about').textContent.startsWith('Both after 11 steps')")

    with Client(served) as client:
        mine, theirs = (client.attach(i).state("memory")["memory"] for i in (second, first))
    difference = theirs - mine
    most = float(np.abs(difference).max())
    drawn = values(page.pixels("canvas[data-compare='difference']"), "difference", -most, most, 255)
    np.testing.assert_allclose(drawn, difference, atol=most / 100)
    assert f"{np.count_nonzero(difference)} of {difference.size} numbers differ" in (
        page.page.locator("#compare-about").inner_text()
    )


def test_an_edited_cell_goes_on_in_a_fork_and_leaves_the_session_alone(page: Page, served: str) -> None:
    source = page.create()
    page.load("copy", length=5, seed=0)
    page.run(11)
    page.page.locator("#memory").click(position={"x": 3, "y": 3})
    page.page.fill("#edit-row", "7")
    page.page.fill("#edit-column", "3")
    page.page.fill("#edit-value", "1.5")

    page.page.locator("#edit-form button").click()
    fork = page.other_session(source)

    with Client(served) as client:
        before, after = (client.attach(i).state() for i in (source, fork))
        assert client.attach(fork).next_step == 11
    assert after["memory"][7, 3] == 1.5
    after["memory"] = np.array(after["memory"])
    after["memory"][7, 3] = before["memory"][7, 3]
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    page.load("copy", length=2, seed=0)
    page.run(5)


def test_an_exported_session_is_imported_again(page: Page, served: str, tmp_path: Path) -> None:
    source = page.create()
    page.load("copy", length=5, seed=0)
    page.run(11)
    page.page.click("#back")
    page.drawn(10)

    exported = saved(page, "#export", tmp_path / "session.safetensors")
    page.page.set_input_files("#import-file", tmp_path / "session.safetensors")
    copy = page.other_session(source)

    expected = states_by_hand(served, 5)
    for name, array in safetensors.numpy.load(exported).items():
        np.testing.assert_array_equal(array, expected[name][10], err_msg=name)
    with Client(served) as client:
        assert client.attach(copy).next_step == 10


def test_picture_and_animation_are_downloaded(page: Page, tmp_path: Path) -> None:
    from PIL import Image

    page.create()
    page.load("copy", length=5, seed=0)
    page.run(11)

    saved(page, "#picture", tmp_path / "picture.png")
    saved(page, "#animation", tmp_path / "animation.gif")

    with Image.open(tmp_path / "picture.png") as image:
        assert image.width > 800
        assert len(image.getcolors(2**24)) > 50
    with Image.open(tmp_path / "animation.gif") as image:
        assert image.n_frames == 12


def test_a_session_is_run_step_by_step_paused_and_reset(page: Page, served: str) -> None:
    session_id = page.create()
    page.load("copy", length=20, seed=0)
    page.page.click("#one-step")
    page.drawn(1)
    page.page.select_option("#speed", "30")
    page.page.click("#run")
    page.until("Number(document.documentElement.dataset.moment) >= 4")
    page.page.click("#pause")
    page.until("!document.getElementById('run').hidden")
    with Client(served) as client:
        session = client.attach(session_id)
        steps = session.next_step
        assert 4 <= steps < 41
        assert page.page.locator("#session-about").inner_text() == f"copy/1, {steps} steps"

        page.page.click("#reset")
        page.until("document.querySelectorAll('.reset-mark').length === 1")

        with client.session("copy") as fresh:
            for name, array in fresh.state().items():
                np.testing.assert_array_equal(session.state(name)[name], array)


def test_steps_are_sent_by_hand_pasted_and_uploaded(page: Page, served: str, tmp_path: Path) -> None:
    session_id = page.create()
    page.page.select_option("#kind", "hand")
    page.page.fill("#hand", "1 0 1 0 1 0 1 0 0")
    page.page.click("#load")
    page.drawn(1)
    page.page.select_option("#kind", "paste")
    page.page.fill("#paste", "0 1 0 1 0 1 0 1 0\n0,0,0,0,0,0,0,0,1")
    page.page.click("#load")
    page.until("document.getElementById('sequence-about').textContent.includes('0 of 2 steps')")
    page.run(3)
    np.save(tmp_path / "more.npy", np.zeros((2, 9), np.float32))
    page.page.select_option("#kind", "upload")
    page.page.set_input_files("#upload", tmp_path / "more.npy")
    page.page.click("#load")
    page.until("document.getElementById('sequence-about').textContent.includes('0 of 2 steps')")
    page.run(5)

    inputs = np.array([[1, 0] * 4 + [0], [0, 1] * 4 + [0], [0] * 8 + [1], [0] * 9, [0] * 9], np.float32)
    with Client(served) as client, client.session("copy") as session:
        session.run(inputs)
        np.testing.assert_array_equal(
            client.attach(session_id).state("memory")["memory"], session.state("memory")["memory"]
        )


def test_the_python_lines_do_the_same(page: Page, served: str) -> None:
    page.create()
    page.load("copy", length=4, seed=3)
    page.run(9)
    page.page.click("#reset")
    page.until("document.querySelectorAll('.reset-mark').length === 1")
    page.load("random", steps=3, seed=1)
    page.run(12)
    source = page.page.locator("#session-id").inner_text()
    page.page.locator("#scrub").focus()
    page.page.keyboard.press("ArrowLeft")
    page.drawn(11)
    page.page.click("#fork")
    fork = page.other_session(source)

    names: dict[str, Any] = {}
    exec(page.page.locator("#python").inner_text(), names)

    with Client(served) as client:
        expected = client.attach(fork)
        assert names["session"].next_step == expected.next_step == 11
        for name, array in expected.state().items():
            np.testing.assert_array_equal(names["session"].state(name)[name], array)
    names["client"].close()


def test_an_lstm_shows_its_state_over_time(page: Page, served: str) -> None:
    session_id = page.create("copy-lstm")
    page.load("copy", length=5, seed=0)
    page.run(11)

    assert page.page.locator("#memory-panel").is_hidden()
    with Client(served) as client:
        state = client.attach(session_id).state("controller_1_hidden")["controller_1_hidden"]
    lane = np.array(page.pixels("canvas[data-lane='controller_1_hidden']"))
    assert lane.shape == (128, 11)
    now = np.array(page.pixels("canvas[data-state='controller_1_hidden']")).reshape(-1)
    assert len(now) == 256
    strongest = np.abs(state).argsort()[-8:]
    assert (now[strongest] != now[np.abs(state).argmin()]).all()


def test_every_shipped_model_runs_its_task(page: Page) -> None:
    for model, kind, steps in [
        ("repeat-copy", "repeat-copy", 22),
        ("associative-recall", "associative-recall", 32),
        ("dynamic-ngrams", "dynamic-ngrams", 199),
        ("priority-sort", "priority-sort", 36),
    ]:
        page.create(model)
        page.load(kind)
        page.run(steps)
        assert page.page.locator("#alert").is_hidden(), model


def test_a_model_of_another_kind_is_shown_by_its_shapes(
    open_page: Callable[..., Page], start_server: Callable[..., ServerProcess], models: Path
) -> None:
    """Many layouts: a small memory that starts from numbers of its own, two layers, and a counter."""
    server = start_server(models)
    with inspecting(server.address) as inspector:
        page = open_page(inspector.url)
        page.create("many_layouts")
        page.load("random", steps=4, seed=0)
        page.run(4)

        assert len(page.pixels("#memory")) == 4
        assert page.page.locator("canvas[data-state='layers']").is_visible()
        text = page.page.locator("#other-states").inner_text()
        assert "count" in text
        assert ": 9" in text


def test_the_keyboard_alone_does_everything(page: Page, served: str) -> None:
    page.until("!document.getElementById('new-session').disabled")
    press = page.page.keyboard.press

    def tab_to(wanted: str) -> None:
        for _ in range(80):
            if page.page.evaluate("document.activeElement.id") == wanted:
                return
            press("Tab")
        raise AssertionError(f"the keyboard does not come to {wanted}")

    tab_to("new-session")
    press("Enter")
    session_id = page.other_session("")
    tab_to("load")
    press("Enter")
    page.until("!document.getElementById('run').disabled")
    tab_to("run")
    press("Enter")
    page.drawn(41)
    tab_to("memory")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        press(key)
    assert page.page.locator("#memory-readout").inner_text().startswith("row 2, column 1:")
    press("Enter")
    page.page.keyboard.type("0.25")
    press("Enter")
    edited = page.other_session(session_id)
    with Client(served) as client:
        assert client.attach(edited).state("memory")["memory"][2, 1] == 0.25
    tab_to("scrub")
    press("End")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_axe_finds_nothing_serious_and_nothing_is_cut_off(
    open_page: Callable[..., Page], scheme: str, width: int
) -> None:
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    first = page.create()
    page.load("copy", length=5, seed=0)
    page.run(11)
    page.create()
    page.load("copy", length=5, seed=1)
    page.run(11)
    page.page.select_option("#compare-with", first)
    page.until("!document.getElementById('compare-maps').hidden")

    page.page.evaluate(Path(AXE_FILE_PATH).read_text())
    found = page.page.evaluate("axe.run()")["violations"]

    serious = [
        (rule["id"], [node["html"] for node in rule["nodes"]])
        for rule in found
        if rule["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_of_a_model_is_markup(
    open_page: Callable[..., Page], start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    import onnx
    from google.protobuf import json_format

    from ntm.v1 import model_pb2

    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    step = onnx.load_from_string(step_models.accumulator())
    spec = json_format.Parse(step.metadata_props[0].value, model_pb2.ModelSpec())
    spec.task = spec.inputs[0].description = spec.outputs[0].description = markup
    step_models.write(tmp_path / "models", step_models.with_spec(step, spec), "hostile")

    with inspecting(start_server(tmp_path / "models").address) as inspector:
        page = open_page(inspector.url)
        page.create("hostile")
        page.load("random", steps=3, seed=0)
        page.run(3)
        page.page.select_option("#kind", "hand")

        assert markup in page.page.locator("#model-about").inner_text()
        assert markup in page.page.locator("#hand-label").inner_text()
        assert page.page.locator("img").count() == 0
        assert page.page.locator("script").count() == 1


def test_what_others_do_in_a_session_is_followed(page: Page, served: str) -> None:
    session_id = page.create()
    page.page.check("#follow")
    inputs = np.random.default_rng(0).integers(0, 2, (6, 9)).astype(np.float32)
    with Client(served) as client:
        other = client.attach(session_id)
        page.until(f"document.documentElement.dataset.following === {session_id!r}")
        memories = [other.state("memory")["memory"]]
        for step in inputs[:4]:
            other.step(step)
            memories.append(other.state("memory")["memory"])
        page.drawn(4)
        farthest = float(np.abs(memories).max())
        drawn = shown_memory(page, memories[-1], -farthest, farthest)
        np.testing.assert_allclose(drawn, memories[-1], atol=farthest / 100)

        page.load("zeros", steps=2)
        page.run(6)
        assert client.attach(session_id).next_step == 6
        other.delete()
    page.until("!document.getElementById('alert').hidden")
    assert not page.page.is_checked("#follow")


def test_a_failure_is_said_and_can_be_dismissed(page: Page, served: str) -> None:
    session_id = page.create()
    page.load("copy", length=5, seed=0)
    with Client(served) as client:
        client.attach(session_id).step(np.zeros(9))

    page.page.click("#run")

    page.until("!document.getElementById('alert').hidden")
    assert "somebody else has stepped this session" in page.page.locator("#alert-text").inner_text()
    page.page.click("#alert-close")
    assert page.page.locator("#alert").is_hidden()
    page.problems.clear()  # the browser itself writes the refused request to the console


def test_a_page_with_a_token_asks_for_it(open_page: Callable[..., Page], served: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef\n")
    with inspecting(served, "--token-file", str(tmp_path / "token")) as inspector:
        page = open_page(inspector.url)
        page.page.fill("#token", "0123456789abcdef")
        page.page.click("#token-form button")
        page.create()
        page.problems.clear()

        other = open_page(f"{inspector.url}#0123456789abcdef")
        other.create()
        assert "#" not in other.page.url


def test_the_inspector_starts_a_server_of_its_own(open_page: Callable[..., Page]) -> None:
    with inspecting() as inspector:
        page = open_page(inspector.url)
        page.create()
        page.load("copy", length=3, seed=0)
        page.run(7)
        assert "0 of 24 bits wrong" in page.page.locator("#sequence-about").inner_text()


def test_the_recurrent_policy_of_the_examples_is_driven_by_hand_and_followed(
    open_page: Callable[..., Page], start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """An LSTM of two states, stepped by the page and, with a new episode, by a program."""
    from examples.recurrent_policy import export

    export(tmp_path / "models" / "policy" / "1")
    server = start_server(tmp_path / "models")
    with inspecting(server.address) as inspector, Client(server.address) as client:
        page = open_page(inspector.url)
        session_id = page.create("policy")
        page.load("random", steps=5, seed=0)
        page.run(5)
        page.page.check("#follow")
        page.until(f"document.documentElement.dataset.following === {session_id!r}")
        other = client.attach(session_id)
        for is_new in (False, True, False):
            other.run(np.ones((1, 2), np.float32), [is_new])
        page.drawn(8)

        state = other.state()
        for name in ("h", "c"):
            drawn = np.array(page.pixels(f"canvas[data-state='{name}']")).reshape(-1)
            assert len(drawn) == state[name].size
            values_now = state[name].reshape(-1)
            assert len(set(drawn[values_now.argsort()[[0, -1]]])) == 2
        assert len(page.pixels("canvas[data-lane='h']")[0]) == 8
        page.page.click("#fork")
        fork = page.other_session(session_id)
        np.testing.assert_array_equal(client.attach(fork).state("h")["h"], state["h"])
