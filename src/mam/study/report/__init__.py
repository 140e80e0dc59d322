"""`mam report`: tables, figures and numbers over many runs."""
