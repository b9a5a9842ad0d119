"""What can a VLM study show without a download? The embedded mini study: scenes, questions and a small LM.

    dice ─▶ scenes ─▶ render ─▶ image bytes ─▶ (phase one: encoder, cache)
                 └──▶ questions ─▶ study: conversations to train on, questions to answer
    language: the tokenizer and the symbolic scenes on which the LM in `lm/` was trained

Everything is a pure function of (split, index): no file is downloaded and no generator's state is kept.
"""
