"""What a VLM is made of: connectors, prompt formats, LLM loading, the model. No image code and no annotations.

tokens of a cache ─▶ connector ─┐
                                ├─▶ [bos][visual][text] ─▶ LLM ─▶ token losses | answers
conversation ─▶ prompt ─────────┘
"""
