"""How the storyteller was made: stories written by SmolLM2, a tokenizer, training.

    # stories, through this engine
    python -m checkpoints.storyteller.recipe.generate FOLDER --minutes 8
    # tokenizer, training, model card
    python -m checkpoints.storyteller.recipe.train FOLDER --minutes 8

Run both in the folder of the clone, because Python finds this package there. Both stop when their
time is up and go on where they stopped when they are called again. In reading order: grid and
outline (what a story is about), writer, shards and generate (SmolLM2 writes it), filters (which are
kept), chats (how they are asked for), tokenizer, pack, prepare, train, card, ship.
"""
