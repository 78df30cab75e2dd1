"""--compile: compiled blocks give what plain ones give, and where nothing can be compiled that is told before any work.

Most tests trace and differentiate as torch.compile does and then run torch's own operations ("aot_eager"), which takes no
compiler; one has the real one compile.
"""

import os
import shutil

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

import sifm_min
from sifm_min import cli, compiled, edit, evaluate, immunize
from sifm_min.editors import load_editor
from sifm_min.models.mmdit import MMDiT, MMDiTConfig
from sifm_min.models.vae import AutoencoderKL, VAEConfig

PROMPT = "a red hat"
KINDS = {"instruct-pix2pix": None, "sd3": 6, "ultraedit": 12}               # None, or the transformer's channels
# kind -> runs: of a size, so many timesteps at once, blocks computed again or not, weights frozen or not. Few: all compile.
RUNS = {"instruct-pix2pix": [((32, 32), 3, False, True), ((48, 32), 2, True, False)],
        "sd3": [((48, 32), 2, True, True)]}                  # whose networks are UltraEdit's


@pytest.fixture(scope="module", autouse=True)
def counter():
    """The backend of these tests, which counts what it is given; to run uncompiled after too many versions is an error."""
    strict = {name: True for name in ("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit")
              if hasattr(torch._dynamo.config, name)}
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(**strict):
        backend = CompileCounterWithBackend("aot_eager")
        patch.setattr(compiled, "BACKEND", backend)
        yield backend
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch):
    """A backend that only counts: a list of the pieces of code that were traced, which then run as they are."""
    seen = []

    def keep(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", keep)
    return seen


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A function: kind -> the folder of a small editor of that kind."""
    made = {}

    def get(kind):
        if KINDS[kind] is None:
            return tiny_folder
        small_sd3 = pytest.importorskip("small_sd3", reason="diffusers is not here")
        if kind not in made:
            if not made:
                made["tokenizers"] = small_sd3.write_tokenizers(tmp_path_factory.mktemp("tokenizers"))
            pipeline = small_sd3.pipeline("another VAE, short prompts", tokenizers=made["tokenizers"], in_channels=KINDS[kind])
            made[kind] = small_sd3.write(pipeline, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture(scope="module")
def pair(folder):
    """A function: kind -> (the editor as it is, the same compiled)."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = load_editor(folder(kind), device="cpu"), load_editor(folder(kind), device="cpu")
            made[kind][1].compile()
        return made[kind]

    return get


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def taken(editor, size, batch, prepared, taps):
    """(taps -> activations, the picture decoded again, the gradient of both at the pixels)."""
    pixels = draw(1, 3, *size).requires_grad_()
    with torch.no_grad():
        text = editor.context([PROMPT])
    times = torch.linspace(100, 900, batch).long()
    when, text = (editor.prepare_timesteps(times, text), editor.prepare_text(text)) if prepared else (times, text)
    condition = editor.encode(pixels)
    many = condition.expand(batch, -1, -1, -1)
    found = editor.features(many, editor.noise_latent(many, draw(*many.shape, seed=1), times), when, text, taps=taps)
    decoded = editor.decode(condition)
    loss = sum(value.square().mean() for value in (*found.values(), decoded))
    return found, decoded, torch.autograd.grad(loss, pixels)[0]


@pytest.mark.parametrize("kind", RUNS)
def test_activations_and_gradients_are_those_of_plain_blocks(kind, pair, counter):
    before, editors = counter.frame_count, pair(kind)
    taps = [*editors[0].default_taps, "out"]
    for size, batch, checkpointing, frozen in RUNS[kind]:
        for editor in editors:
            editor.checkpointing = checkpointing
            editor.denoiser.requires_grad_(not frozen)
            editor.vae.requires_grad_(not frozen)
        (plain, picture, expected), (found, decoded, gradient) = (
            taken(editor, size, batch, prepared=frozen, taps=taps) for editor in editors)
        assert plain.keys() == found.keys() and expected.abs().max() > 0
        for one, other in ((picture, decoded), *((plain[name], found[name]) for name in plain)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * one.abs().max().item())
        assert cosine(expected, gradient) > 0.9999, (size, batch, checkpointing, frozen)
        assert (expected - gradient).abs().max() <= 1e-3 * expected.abs().max()
    for editor in editors:
        editor.checkpointing = False
        editor.denoiser.requires_grad_(False)
        editor.vae.requires_grad_(False)
    assert counter.frame_count > before


@pytest.mark.parametrize("kind", ["instruct-pix2pix", "ultraedit"])
def test_an_edit_is_the_plain_ones(kind, pair):
    picture = Image.fromarray((255 * draw(40, 32, 3).numpy()).astype(np.uint8))
    plain, edited = (np.array(editor.edit(picture, PROMPT, steps=2)).astype(int) for editor in pair(kind))
    assert plain.shape == edited.shape and plain.std() > 0
    assert abs(plain - edited).max() <= 1


def test_weights_are_read_when_a_block_first_runs_and_what_never_runs_is_neither_read_nor_compiled(tiny_folder, traced):
    editor = load_editor(tiny_folder, device="cpu")
    editor.compile()
    assert editor.denoiser.mid_block.resnets[0].conv1.weight.is_meta
    latent, text = draw(1, 4, 4, 4), editor.context([PROMPT])
    found = editor.features(latent, latent, torch.tensor([500]), text, taps=["down_blocks.0.attentions.0"])
    assert list(found) == ["down_blocks.0.attentions.0"]
    assert not editor.denoiser.down_blocks[0].resnets[0].conv1.weight.is_meta
    assert editor.denoiser.mid_block.resnets[0].conv1.weight.is_meta and editor.vae.decoder.conv_in.weight.is_meta
    assert len(traced) == 3                                 # with the probe: a residual block and a transformer block


def test_blocks_of_one_shape_share_what_is_compiled_and_sizes_do_not_use_up_the_versions(traced):
    """A few sizes in, nothing more is compiled; and the limit, after which torch runs what it has not compiled, is an error
    here."""
    torch.manual_seed(0)
    config = MMDiTConfig(num_layers=4, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8, in_channels=4,
                         out_channels=4, pooled_projection_dim=6, caption_projection_dim=8, pos_embed_max_size=12, patch_size=2)
    network = MMDiT(config).requires_grad_(False)
    network.pos_embed.pos_embed.copy_(draw(*network.pos_embed.pos_embed.shape))
    compiled.compile_blocks(network)

    def run(batch, height, width):
        latent = draw(batch, 4, height, width).requires_grad_()
        network(latent, 500, draw(1, 3, 8), draw(1, 6)).sum().backward()
        with torch.no_grad():
            network(latent, 500, draw(1, 3, 8), draw(1, 6))

    run(3, 8, 8)
    assert len(traced) <= 6                 # first, middle and last block, with and without a gradient
    run(1, 8, 8)
    run(10, 8, 8)
    run(2, 8, 12)
    run(1, 12, 8)
    known = len(traced)
    for batch, height, width in ((5, 16, 8), (2, 10, 10)):
        run(batch, height, width)
    assert len(traced) == known


def test_the_real_compiler(monkeypatch):
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl")):
        pytest.skip("no C++ compiler is here")
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    try:
        compiled.check(torch.device("cpu"))
    except ValueError as error:
        pytest.skip(f"torch finds no compiler that works: {error}")
    torch.manual_seed(0)
    network = AutoencoderKL(VAEConfig(block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=4,
                                      mid_block_add_attention=False)).requires_grad_(False)
    pixels = draw(1, 3, 16, 16).requires_grad_()
    expected = network.encode(pixels)[0]
    gradient = torch.autograd.grad(expected.square().sum(), pixels)[0]
    compiled.compile_blocks(network)
    found = network.encode(pixels)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert cosine(torch.autograd.grad(found.square().sum(), pixels)[0], gradient) > 0.9999


# ------------------------------------------------------------------------------------------------ where nothing compiles

MISSING = "No working C++ compiler found in\n  (None, 'g++')"


def refusing(graph, inputs):
    raise RuntimeError(f"{MISSING}\n\nSet a variable for more, says the compiler to its developers.")


def after_the_probe(graph, inputs):
    """Compiles the probe, and nothing that has weights."""
    return graph.forward if len(inputs) == 1 else refusing(graph, inputs)


@pytest.fixture
def commanded(tiny_folder, tmp_path, monkeypatch):
    """Run a command on a picture with the tiny editor."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray((255 * draw(32, 32, 3).numpy()).astype(np.uint8)).save("a.png")
    steps = {immunize: ("--steps", "1", "--timesteps", "1", "--no-preview"), edit: ("--steps", "1")}

    def run(command, *options):
        return command.main(["a.png", "--prompt", PROMPT, "--editor", str(tiny_folder), "-o", "out", "--device", "cpu",
                             *steps[command], *options])

    return run


@pytest.mark.parametrize("command", [immunize, edit], ids=["immunize", "edit"])
def test_without_a_compiler_a_command_says_so_and_does_nothing(command, commanded, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compiled, "BACKEND", refusing)
    assert commanded(command, "--compile") == cli.USAGE
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "torch.compile does not work here (" in err and "No working C++ compiler found in (None, 'g++')" in err
    assert err.endswith("; leave --compile out\n") and "developers" not in err


def test_switched_off_is_not_silently_uncompiled(tiny_folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)         # what TORCH_COMPILE_DISABLE does
    editor = load_editor(tiny_folder, device="cpu")
    with pytest.raises(ValueError, match="torch.compile is switched off here, .*; leave --compile out"):
        editor.compile()
    assert editor.compiled is False


def test_a_block_that_does_not_compile_is_told_in_a_sentence(commanded, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "BACKEND", after_the_probe)
    assert commanded(immunize, "--compile", "--quiet") == cli.SOME_FAILED
    out, err = capsys.readouterr()
    assert out == "" and "torch.compile failed (" in err and "No working C++" in err and "Traceback" not in err


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="^shapes differ$"), compiled.in_words():
        raise RuntimeError("shapes differ")


# ---------------------------------------------------------------------------------------------------- commands, reports

def test_the_command_compiles_and_reports_it(commanded, traced, tmp_path):
    assert commanded(immunize, "--quiet") == cli.OK
    assert not traced and '"compiled": false' in (tmp_path / "out" / "a.json").read_text()
    with Image.open("out/a_immunized.png") as plain:
        plain = np.array(plain).astype(int)
    assert commanded(immunize, "--quiet", "--compile", "--overwrite") == cli.OK
    assert traced and '"compiled": true' in (tmp_path / "out" / "a.json").read_text()
    with Image.open("out/a_immunized.png") as other:
        assert (np.array(other) == plain).mean() > 0.99      # a sign may turn where the gradient is next to nothing


def test_evaluate_compiles_its_editors_and_tells_their_edits_apart(tiny_folder, monkeypatch):
    asked = []

    def compile(self):
        asked.append(self.name)
        self.compiled = True

    monkeypatch.setattr(sifm_min.editors.Editor, "compile", compile)
    given = ["run", "white-box", "--editor", str(tiny_folder), "-o", "out", "--quiet"]
    identities = []
    for options in ([], ["--compile"]):
        editors, again = evaluate._editors(evaluate._parser().parse_args([*given, *options]))
        identities.append([evaluate.protocol.identity(editor) for editor in (*editors.values(), again[tiny_folder.name]())])
    assert len(asked) == 2 and "compiled" not in identities[0][0]
    assert identities[1] == [{**identity, "compiled": True} for identity in identities[0]]
