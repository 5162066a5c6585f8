"""Persona datasets: several samples for every item of every user, under an ablation.

A dataset is a folder of records (`data`); a table says what is asked for in each (`datasets`); a
prompt is built from a record by a template of its language and fitted to the context by whole turns
(`prompts`, `fitting`); a job makes the samples and may be interrupted at any moment (`job`, `run`);
what it found is written in one file a user (`results`).
"""
