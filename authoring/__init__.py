"""The tools of the course's authors. No lesson, no command of a learner and no engine needs them.

    python -m authoring.build        # write the notebooks from their sources (build, execute)
    python -m authoring.screens      # look at them in JupyterLab and Chromium (screens, lab)
    python -m authoring.pictures     # write figures/*.svg
    python -m authoring.vllm_table   # whether docs/vllm_api.md is current

lints, lint_pages and lint_exercises say what every notebook must be. nbval_rules has the rules
under which pytest runs them. Run all of these in the folder of a clone; they are not installed.
"""
