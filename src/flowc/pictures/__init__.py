"""Pictures of a workflow: DOT, SVG, Mermaid, JSON and one self-contained HTML page. All of them work offline.

`model` turns a graph into a drawing (what is shown), `layout` gives it places, the other modules write formats.
"""
