"""`funnel bench report`: results of all suites as one HTML page that needs nothing else.

A suite says in `<suite>/section.py` what its results are (`section.Section`); `suites` lists them, `page` shows them.
"""
