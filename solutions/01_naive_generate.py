# %% [markdown]
# # 01 · Exercises: one token at a time
#
# Three exercises on [lesson 01](../notebooks/01_naive_generate.ipynb), about 40 minutes. Write in the
# marked cells, run them, then run the check below. A check that passes is noted: `course progress` lists
# them, `course reset 01` gives a fresh page and keeps yours. Hints stand below each exercise, in three
# folds: a nudge, the steps, the solution.

# %%
import torch

from course.checks import lesson01

# %% [markdown]
# ## 1 · Predict: the cost of an answer
#
# *easy, 5 minutes*
#
# A model of another shape answers a prompt of $P = 100$ tokens with $N = 50$, by lesson 01's loop:
# everything is computed again for each new token, and nothing after the last.
#
# | $d$ | $L$ | $H$ | $K$ | $D$ | $I$ |
# |--:|--:|--:|--:|--:|--:|
# | 512 | 10 | 8 | 2 | 64 | 1,536 |
#
# - `computed`: how many tokens does the model compute for the whole answer, all steps together?
# - `different`: how many different tokens are among them?
# - `weights`: $W$, the numbers in all layers' matrices (not the embedding).
#
# A formula is welcome: `computed = 2 * 3 + 4`.

# %% tags=["exercise-answer_cost"]
### BEGIN SOLUTION
computed = 50 * 100 + 50 * 49 // 2
different = 100 + 50 - 1
weights = 10 * (2 * 512 * 64 * (8 + 2) + 3 * 512 * 1536)
### INSTEAD
# computed = None
# different = None
# weights = None
### END SOLUTION

# %%
lesson01.check_answer_cost(computed, different, weights)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Write down the lengths of the texts that the first three steps read. Where does the sequence end? For
# $W$, the formula stands in the lesson, under *Measure*.
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# The steps read $P, P + 1, \dots, P + N - 1$ tokens: $N$ numbers, whose sum is $NP + N(N - 1)/2$. The
# last token is written and never read. $W = L\,(2dD(H + K) + 3dI)$.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution answer_cost}}
#
# </details>

# %% [markdown]
# ## 2 · Implement: top-p for one row of logits
#
# *medium, 20 minutes*
#
# Top-p keeps the likeliest tokens until their probabilities sum to at least $p$, and no more. Take
# logits whose probabilities are 0.5, 0.3, 0.15, 0.05: with $p = 0.7$ the first two stay (0.5 is not
# enough, 0.8 is), with $p = 0.5$ the first alone. The likeliest token always stays, also at $p = 0$.
#
# `top_p` returns the logits with $-\infty$ at every token that is dropped: a softmax afterwards shares
# all probability among those that stay. It leaves its argument as it was.


# %% tags=["exercise-top_p"]
def top_p(logits, p):
    """logits [vocab_size] -> [vocab_size]: -inf for the tokens outside the top-p set."""
    ### BEGIN SOLUTION sort the probabilities and see which are needed to reach p
    values, order = logits.sort(descending=True)
    probs = values.softmax(dim=0)
    before = probs.cumsum(dim=0) - probs  # what stands before each token
    dropped = before >= p
    dropped[0] = False
    kept = logits.clone()
    kept[order[dropped]] = -torch.inf
    return kept
    ### END SOLUTION


# %% [markdown]
# Try it on the example, in an order that is not sorted:

# %%
probs = torch.tensor([0.05, 0.5, 0.15, 0.3])
try:
    print("kept at p = 0.7:", (top_p(probs.log(), 0.7) > -torch.inf).tolist())
except NotImplementedError as todo:
    print("to do:", todo)

# %%
lesson01.check_top_p(top_p)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Whether a token is needed depends on the sum of the probabilities *before* it, in sorted order, and
# not on the sum that includes it.
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# Sort the logits, largest first, and keep the order. Softmax; cumulative sum; subtract each token's own
# probability. Drop where that is at least $p$, but never the first. Write $-\infty$ at the *original*
# places of the dropped tokens, in a copy.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution top_p}}
#
# </details>

# %% [markdown]
# ## 3 · Break and fix: a second beginning
#
# *easy, 15 minutes*
#
# Many models were trained on texts that begin with a special token, BOS (*beginning of sequence*). Their
# tokenizer puts it in front of whatever it encodes, and their chat template writes it, too. An engine
# that first renders the template and then encodes the text begins with **two**. No model was trained on
# that; nothing crashes, and answers get a little worse. llama.cpp, vLLM and others have warned of it or
# shipped it.
#
# Here is such a tokenizer, and a function like theirs. Run it: what should the ids begin with?

# %%
tokenizer = lesson01.tokenizer_with_bos()
print("BOS is", tokenizer.bos_token, "with id", tokenizer.bos_token_id)


# %% tags=["exercise-encode_prompt"]
def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt: a text, or a chat (a list of messages)."""
    ### BEGIN SOLUTION
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)  # the template wrote them
    ### INSTEAD
    # if not isinstance(prompt, str):
    #     prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    # return tokenizer.encode(prompt)
    ### END SOLUTION


# %%
chat = [{"role": "user", "content": "Tell me a story."}]
for prompt in ("Once upon a time", chat):
    ids = encode_prompt(tokenizer, prompt)
    print(ids[:4], repr(tokenizer.decode(ids[:4])))

# %% [markdown]
# A text gets one BOS, the chat gets two. Repair `encode_prompt` in its cell, so that both begin with
# exactly one; of a chat the template alone decides (some write none). A user may write anything into a
# message, and what they wrote must arrive.

# %%
lesson01.check_encode_prompt(encode_prompt)

# %% [markdown]
# <details><summary>Hint 1: a nudge</summary>
#
# Who has written the first BOS of the chat, and who the second? Which of the two can be asked not to?
#
# </details>
# <details><summary>Hint 2: the steps</summary>
#
# A text: encode as before. A chat: render it, then encode the result with `add_special_tokens=False`.
# Taking a BOS out of the ids afterwards is no repair: some templates write none.
#
# </details>
# <details><summary>Hint 3: the solution</summary>
#
# {{solution encode_prompt}}
#
# </details>
