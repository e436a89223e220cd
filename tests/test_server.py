"""The example server, over a socket, asked by OpenAI's own client."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import headstart as hs
from conftest import Maker

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

SERVER = Path(__file__).resolve().parent.parent / "examples" / "server"
PROMPT = "The sea"


@pytest.fixture(scope="module")
def folder(llama: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters that change what a tiny model says; the third in another place."""
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(3)
    for name, fields in {"fr": {"r": 8}, "sql": {"r": 4, "init_lora_weights": "pissa"}, "later/new": {"r": 2}}.items():
        model = llama()
        adapter = hs.adapt(model, hs.LoraConfig(lora_alpha=16, **fields))
        with torch.no_grad():
            for factor in adapter.parameters():
                factor.add_(torch.randn_like(factor))
        hs.save(model, root / name)
    return root


@pytest.fixture(scope="module")
def base(llama: Maker) -> Any:
    model: Any = llama()
    return model


@pytest.fixture(scope="module")
def client(base: Any, tokenizer: Any, folder: Path) -> Iterator[Any]:
    """A client of a server that runs in a thread, on a port that the system chose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SERVER))
        import app

        server = uvicorn.Server(
            uvicorn.Config(app.create_app(base, tokenizer, "base", folder), port=0, log_level="warning")
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def alone(base: Maker, tokenizer: Any, adapter: Path | None, count: int, prompt: str = PROMPT) -> str:
    """What one adapter says by itself, greedily: no bank, no server, no batch."""
    model: Any = base()
    if adapter is not None:
        hs.load(model, adapter)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def say(client: Any, model: str, count: int = 12, **options: Any) -> Any:
    return client.completions.create(model=model, prompt=PROMPT, max_tokens=count, temperature=0, **options)


def test_it_lists_the_base_and_its_adapters(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["base", "fr", "sql"]


@pytest.mark.parametrize("name", ["base", "fr", "sql"])
def test_a_request_is_answered_by_the_adapter_that_it_names(
    name: str, client: Any, llama: Maker, tokenizer: Any, folder: Path
) -> None:
    expected = alone(llama, tokenizer, None if name == "base" else folder / name, 12)
    answer = say(client, name)
    assert answer.choices[0].text == expected
    assert answer.model == name
    assert answer.usage.completion_tokens <= 12
    assert answer.choices[0].finish_reason == ("length" if answer.usage.completion_tokens == 12 else "stop")


def test_the_adapters_differ(llama: Maker, tokenizer: Any, folder: Path) -> None:
    said = {alone(llama, tokenizer, path, 12) for path in (None, folder / "fr", folder / "sql", folder / "later/new")}
    assert len(said) == 4


def test_a_stream_comes_in_pieces_and_says_the_same(client: Any) -> None:
    chunks = list(say(client, "fr", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == say(client, "fr").choices[0].text
    assert len(chunks) > 2
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def test_requests_at_once_share_a_batch(client: Any, base: Any, llama: Maker, tokenizer: Any, folder: Path) -> None:
    batches: list[int] = []
    handle = base.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    names = ["base", "fr", "sql", "fr", "base", "sql", "fr", "sql"]
    counts = [3, 12, 7, 5, 9, 12, 1, 4]
    prompts = ["The sea", "A", "One two three", "Select", "x", "The", "The sea is", "Hm"]

    def ask(name: str, count: int, prompt: str) -> str:
        answer = client.completions.create(model=name, prompt=prompt, max_tokens=count, temperature=0)
        return str(answer.choices[0].text)

    try:
        with ThreadPoolExecutor(len(names)) as pool:
            said = list(pool.map(ask, names, counts, prompts))
    finally:
        handle.remove()
    for name, count, prompt, text in zip(names, counts, prompts, said, strict=True):
        assert text == alone(llama, tokenizer, None if name == "base" else folder / name, count, prompt)
    assert max(batches) > 1


def test_chats(client: Any, llama: Maker, tokenizer: Any, folder: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    asked = {"model": "sql", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
    expected = alone(llama, tokenizer, folder / "sql", 8, prompt)
    assert client.chat.completions.create(**asked).choices[0].message.content == expected
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_adapters_come_and_go_while_others_are_served(
    client: Any, llama: Maker, tokenizer: Any, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'new'"):
        say(client, "new")
    (folder / "later/new").rename(folder / "new")
    try:
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(say, client, "fr", 60)
            assert client.post("/adapters/new", cast_to=dict)["id"] == "new"
            assert say(client, "new").choices[0].text == alone(llama, tokenizer, folder / "new", 12)
            assert other.result().choices[0].text == alone(llama, tokenizer, folder / "fr", 60)
        assert client.delete("/adapters/new", cast_to=dict)["deleted"]
        with pytest.raises(openai.NotFoundError, match="no model 'new'"):
            say(client, "new")
        with pytest.raises(openai.NotFoundError, match="holds no adapter 'new'"):
            client.delete("/adapters/new", cast_to=dict)
    finally:
        (folder / "new").rename(folder / "later/new")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 17}, "n: Input should be less than"),
        ({"n": 16, "prompt": ["a"] * 5}, "at most 64 answers"),
        ({"logprobs": 1}, "logprobs: Extra inputs are not permitted"),
        ({"presence_penalty": 0.5}, "presence_penalty: Input should be 0"),
        ({"top_p": 0}, "top_p: Input should be greater"),
        ({"stop": list("abcde")}, "stop.*at most 4"),
        ({"prompt": [10**6]}, "prompt: tokens of 'base' are 0 to"),
        ({"prompt": []}, "prompt"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than"),
        ({"max_tokens": 1000}, "have room"),
        ({"prompt": ["a", 2]}, "prompt"),
        ({"temperature": -1}, "temperature: Input should be greater"),
    ],
)
def test_what_is_not_served_is_refused_and_not_ignored(client: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(**{"model": "fr", "prompt": "x", **options})


@pytest.mark.parametrize("name", ["..%2F..%2Fetc", "%2Fetc", ".hidden", "base", "absent"])
def test_only_folders_beside_the_others_are_loaded(client: Any, name: str) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
        client.post(f"/adapters/{name}", cast_to=dict)
    assert [model.id for model in client.models.list()] == ["base", "fr", "sql"]


def test_a_batch_that_fails_is_answered_and_the_next_one_runs(
    client: Any, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = say(client, "fr").choices[0].text
    with monkeypatch.context() as patch:
        patch.setattr(base, "generate", lambda *_, **__: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="division"):
            say(client, "fr")
        with pytest.raises(openai.APIError, match="division"):
            list(say(client, "fr", stream=True))
    assert say(client, "fr").choices[0].text == before


def test_a_client_that_goes_away_ends_its_row(client: Any, base: Any) -> None:
    steps: list[None] = []

    def slowly(*_: object) -> None:
        steps.append(None)
        time.sleep(0.05)

    handle = base.register_forward_pre_hook(slowly)
    try:
        with say(client, "sql", 110, stream=True) as stream:
            next(iter(stream))
        say(client, "base", 1)  # waits for the batch to end
    finally:
        handle.remove()
    assert len(steps) < 80


def test_a_folder_is_never_looked_up_on_the_hub(
    llama: Maker, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.syspath_prepend(str(SERVER))
    import app
    from starlette.testclient import TestClient

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(folder.parent)
    with TestClient(app.create_app(llama(), tokenizer, "base", Path(folder.name))) as client:
        assert client.post("/v1/adapters/absent").status_code == 400
        assert client.post("/v1/adapters/fr").status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_ends_the_text_before_it(client: Any, streamed: bool) -> None:
    whole = say(client, "fr", 40).choices[0].text
    stop = next(whole[i - 2 : i + 1] for i in range(4, len(whole)) if whole[i - 2 : i + 1].isascii())
    for given in (stop, ["never said", stop]):
        answer = say(client, "fr", 40, stop=given, stream=streamed)
        chunks = list(answer) if streamed else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.find(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"
    cut = say(client, "fr", 12, stop=say(client, "fr", 12).choices[0].text + "!")  # begun, and never ended
    assert cut.choices[0].text == say(client, "fr", 12).choices[0].text


@pytest.mark.parametrize(
    ("stops", "pieces", "reason"),
    [
        ((), ["t", "h", "e", " ", "c", "a", "t"], "length"),
        (("cat",), ["t", "h", "e", " "], "stop"),
        (("cat", "he"), ["t"], "stop"),
        (("e cow",), ["t", "h", "e ca", "t"], "length"),
        (("tx",), ["th", "e", " ", "c", "a", "t"], "length"),
    ],
)
def test_what_may_begin_a_stop_waits(
    stops: tuple[str, ...], pieces: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SERVER))
    import asyncio

    import engine

    class Letters:
        def decode(self, made: list[int], **_: Any) -> str:
            return "".join(map(chr, made))

    async def sent() -> tuple[list[str], str | None]:
        answers = engine.Answers([[1]], engine.Wish(7, None, stops=stops), 1)
        (job,), text = answers.jobs, [ord(letter) for letter in "the cat"]
        for count in range(1, 8):
            if job.reason is None:
                job.deliver(text[:count], Letters(), set())
        return [piece async for _, piece in answers.pieces() if piece], job.reason

    assert asyncio.run(sent()) == (pieces, reason)


def test_several_prompts_and_several_answers_keep_their_order(client: Any, llama: Maker, tokenizer: Any) -> None:
    prompts = ["The sea", "A", "One two three"]
    expected = [alone(llama, tokenizer, None, 9, prompt) for prompt in prompts]
    asked = {"model": "base", "max_tokens": 9, "temperature": 0, "n": 2}
    for given in (prompts, [tokenizer(prompt)["input_ids"] for prompt in prompts]):
        answer = client.completions.create(prompt=given, **asked)
        assert [choice.text for choice in answer.choices] == [text for text in expected for _ in range(2)]
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert answer.usage.prompt_tokens == sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
        assert answer.usage.completion_tokens <= 54
    found, ended = [""] * 6, []
    for chunk in client.completions.create(
        prompt=prompts, stream=True, stream_options={"include_usage": True}, **asked
    ):
        for choice in chunk.choices:
            found[choice.index] += choice.text
            ended += [choice.index] * (choice.finish_reason is not None)
        used = chunk.usage
    assert found == [text for text in expected for _ in range(2)]
    assert sorted(ended) == list(range(6))
    assert used == answer.usage


def test_a_seed_repeats_a_draw_in_any_company(client: Any) -> None:
    asked = {"model": "sql", "prompt": PROMPT, "max_tokens": 16, "temperature": 1.5}
    first = client.completions.create(seed=7, n=3, **asked).choices
    assert len({choice.text for choice in first}) > 1
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(say, client, name, 30) for name in ("fr", "base")]
        again = client.completions.create(seed=7, n=3, **asked).choices
        assert all(other.result().choices for other in others)
    assert [choice.text for choice in again] == [choice.text for choice in first]
    assert client.completions.create(seed=8, **asked).choices[0].text != first[0].text


def test_top_p_leaves_out_what_is_unlikely(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a nucleus written out: the fewest most likely tokens whose shares reach top_p."""
    monkeypatch.syspath_prepend(str(SERVER))
    import asyncio

    import engine

    scores = torch.tensor([0.1, 0.2, 0.15, 0.5, 0.05]).log()

    async def drawn(top_p: float, temperature: float) -> set[int]:
        wish = engine.Wish(1, None, temperature, top_p, seed=0)
        job = engine.Job([1], wish, 0, asyncio.Queue())
        return {engine._drawn(scores, job) for _ in range(400)}

    for top_p, likely in {1.0: {0, 1, 2, 3, 4}, 0.9: {0, 1, 2, 3}, 0.72: {1, 2, 3}, 0.6: {1, 3}, 0.01: {3}}.items():
        assert asyncio.run(drawn(top_p, 1.0)) == likely
    assert asyncio.run(drawn(1.0, 0.0)) == {3}


def test_one_model_is_looked_up_by_its_name(client: Any) -> None:
    assert client.models.retrieve("fr").id == "fr"
    with pytest.raises(openai.NotFoundError, match="no model 'absent'"):
        client.models.retrieve("absent")


def test_nulls_and_parts_of_messages_as_clients_send_them(client: Any) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    asked = {"model": "sql", "max_completion_tokens": 8, "temperature": 0}
    plain = client.chat.completions.create(messages=[{"role": "user", "content": "Hello"}], **asked)
    nulls = {"stop": None, "top_p": None, "seed": None, "presence_penalty": 0, "frequency_penalty": 0.0}
    found = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **asked, **nulls)
    assert found.choices[0].message == plain.choices[0].message


def test_temperature_samples(client: Any) -> None:
    asked = {"model": "base", "prompt": PROMPT, "max_tokens": 16, "temperature": 2}
    assert len({client.completions.create(**asked).choices[0].text for _ in range(3)}) > 1


def test_the_model_is_the_base_again_when_the_server_ends(
    llama: Maker, tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SERVER))
    import app
    from starlette.testclient import TestClient

    model = llama()
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    untouched = copy.deepcopy(model.state_dict())
    with TestClient(app.create_app(model, tokenizer, "base", folder)) as client:
        assert client.get("/v1/models").status_code == 200
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
