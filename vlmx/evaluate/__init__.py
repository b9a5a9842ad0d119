"""How good are the answers, and is the difference to another encoder real? Answers, then scores.

run + cached tokens ─ predict ─▶ answers.jsonl ─ score ─▶ scores.json ─┬─ aggregate: weighted averages as in the paper
                                                   ▲                   ├─ compare:   paired differences with intervals
                      metrics, baselines, intervals ┘                   └─ report:    one HTML file

cached tokens ─ probe ─▶ what can be read linearly from frozen tokens, without any LLM
"""
