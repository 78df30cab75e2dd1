"""The paper's experiments: plan a run, carry it out step by step, and make tables of the results.

`suites` says which arms and pictures each experiment has, `plan` makes the plan and the keys of its steps, `store` keeps
the results of steps, `runner` carries a plan out, `results` collects what is there, `tables` and `page` show it.
"""
