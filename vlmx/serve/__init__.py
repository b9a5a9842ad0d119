"""What spans the phases: the demo (extract -> train -> eval -> report), the lists, the check of a machine."""
