"""The one style sheet of the HTML reports."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { border-top: 1px solid #ccc; padding-top: 1rem; margin-top: 2.5rem } h1, h2, h3 { line-height: 1.2 }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; font-size: .87em }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: right } th:first-child, td:first-child
{ text-align: left } th { font-weight: 600; vertical-align: bottom } img { max-width: 100%; height: auto }
.warning { background: #fff3d6; border-left: 4px solid #d99400; padding: .4rem .8rem; margin: .5rem 0 }
figure { margin: 1rem 0 } figcaption { color: #555; font-size: .9em } pre { white-space: pre-wrap; font-size: .85em }
.out td, .out h2 { color: #b00 }
"""
