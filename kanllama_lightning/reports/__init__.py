"""The research record of a saved head: reports that write tables, figures and pages."""
