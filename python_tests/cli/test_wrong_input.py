"""Wrong input to every command: an exit code, words that name it, no traceback, and nothing written."""

import json

import numpy as np
import pytest

from klflow_ext import Denoiser, DenoiserConfig, LogitPath, Run, TrainConfig, data
from klflow_ext.train import Trainer

WRONG = """
sample RUN --steps 0 : steps: got 0
sample RUN --steps x : invalid literal
sample RUN --count 99999999 : count: got 99999999
sample RUN --length -3 : length: got -3
sample RUN --length 1000 : at most the model's max_length, 32
sample RUN --top-k 0 : top_k: got 0
sample RUN --top-p nan : top_p: got nan
sample RUN --temperature nan : temperature: got nan
sample RUN --temperature 1 2 3 : temperature
sample RUN --seed 99999999999999999999999 : seed: got 9999
sample RUN --seeds 1 2 : seed: got 2 seeds, allowed is one or 4
sample RUN --method fast : method: got 'fast'
sample RUN --method slices : method: got 'slices', allowed is another method for this network, which was not trained for slices
sample RUN --layout a : layout
sample RUN --slice-steps 0 : slice_steps: got 0
sample RUN --t-split 2 : t_split: got 2
sample RUN --times 0 2 : times: got 2
sample RUN --boosts 0 : boosts: got 0
sample RUN --final last : invalid choice
sample RUN --device xpu : device: got xpu
sample RUN --live --pause -1 : pause: got -1
sample RUN --html none/a.html : html: got none/a.html
sample RUN --log-likelihood : log_likelihood: got it without jsonl
sample text : run: text is no run folder
sample RUN RUN : Unrecognized options
complete RUN --prompt a --new-tokens 5 --length 9 : new_tokens: got 5 beside length=9
complete RUN --prompts-file none : prompts_file: none cannot be read
complete RUN --prompts-file bytes : prompts_file: bytes cannot be read: it is not UTF-8
complete RUN --prompts-file empty : prompts_file: empty holds no text
infill RUN : text: got none
infill RUN --text {?0} : text: got the hole {?0}
infill RUN --text {?99} : at most the model's max_length, 32
watch none : run: none is no run folder
plot none : none/log.jsonl cannot be read
plot RUN --out a.pdf : out: got a.pdf
plot : Missing from klflow plot: RUN
eval RUN --length 0 : length: got 0
eval RUN --samples 1 : samples: got 1
eval RUN --length 8 --judge text : judge: text has no stories260K.bin
eval RUN --length 8 --data text : data: got text, allowed is none
eval RUN --samples 2 --json none/a.json : json: got none/a.json
eval --data empty : data: empty is empty
prepare none : data: none cannot be read
prepare bytes : data: bytes is not UTF-8
prepare text --vocab-size 5 : vocab_size: got 5
prepare text --heldout 2 : heldout: got 2
prepare text --out text : out: text is a file
prepare text --tokenizer text : tokenizer: text cannot be read
prepare --verify text : data: text is no folder of tokens
train --data none : data: none cannot be read
train --data text text : data: got text, text, allowed are one file
train --data text=2 : data: got text with a weight, allowed are one file
train --data text --out text/a : out: text/a cannot be written
train --data text --out RUN : run holds a run already
train --data text --steps 0 : steps: got 0
train --data text --lr inf : lr: got inf
train --data text --batch-size 99999999 : batch_size: got 99999999
train --data text --length 1 : length: got 1
train --data text --n-layer 0 : n_layer: got 0
train --data text --n-head 3 : n_embd: got 256, allowed is a multiple of 2 n_head
train --data text --n-embd 0 : n_embd: got 0
train --data text --beta 2 : beta: got 2
train --data text --path mask --t-max .1 : t_max: got 0.1
train --data text --seconds 0 : max_seconds: got 0
train --data text --keep 0 : keep: got 0
train --data text --show-every -1 : show_every: got -1
train --data text --heldout-count 99999999 : heldout_count: got 99999999
train --data text --config none : config: got none
train --data text --config broken : config: broken cannot be read
train --data text --config unknown : Unrecognized options: --nothing
train --data text --engine fsdp --compile : compile: got True
train --data text --shuffle documents : shuffle: got 'documents'
train --data text --evidence-share .5 --input simplex --n-embd 8 : evidence_share: got 0.5
adapt none --data text : transformer: none cannot be read
train --resume none : run: none is no run folder
train --resume RUN : resume: the run of run is finished
train --resume RUN --lr 3 : resume: got --lr beside it
train --resume RUN --more-seconds nan : more_seconds: got 0, nan
train --more-steps 3 : more_steps: got 3, allowed is only with --resume
info here : Unrecognized options
completion tcsh : invalid choice
""".strip().splitlines()


@pytest.fixture
def folder(tmp_path):
    """A run and some files beside it."""
    text = "\n<|endoftext|>\n".join(f"one two three {i} four\n" * 20 for i in range(60))
    tokenizer = data.train_tokenizer([text], 280)
    path = LogitPath(data.vocab_size_of(tokenizer))
    stream = data.encode(tokenizer, [text])
    config = TrainConfig(steps=1, length=8, batch_size=2)
    trainer = Trainer(Denoiser(DenoiserConfig(path.vocab_size, 1, 1, 8, 32), path), path, stream, config)
    with Run.create(tmp_path / "run", overwrite=False, tokenizer=tokenizer, stream=stream, heldout=stream[:400]) as run:
        trainer.run = run
        trainer.train_step()
        trainer.save()
    (tmp_path / "text").write_text(text)
    (tmp_path / "bytes").write_bytes(np.arange(256, dtype=np.uint8).tobytes())
    for name, content in (("empty", ""), ("broken", "{"), ("unknown", json.dumps({"nothing": 1}))):
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.slow
def test_it_is_named(klflow, folder):
    before = sorted(folder.rglob("*"))
    for line in WRONG:
        words, _, message = line.partition(" : ")
        done = klflow(*words.replace("RUN", "run").split())  # a traceback would fail here
        said = " ".join(done.stderr.replace("|", " ").split())  # tyro breaks lines
        assert done.returncode == 1 and message in said, (line, said)
        assert not done.stdout, line
    assert sorted(folder.rglob("*")) == before
