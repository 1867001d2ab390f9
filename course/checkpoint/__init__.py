"""How the small model in checkpoints/ was made: stories written by SmolLM2, a tokenizer, training.

    python -m course.checkpoint.generate FOLDER --minutes 8     # stories, through this engine
    python -m course.checkpoint.train FOLDER --minutes 8        # tokenizer, training, model card

Both stop when their time is up and go on where they stopped when they are called again. In reading
order: grid and outline (what a story is about), writer, shards and generate (SmolLM2 writes it),
filters (which are kept), chats (how they are asked for), tokenizer, pack, prepare, train, card,
ship.
"""
