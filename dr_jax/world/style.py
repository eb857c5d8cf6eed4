"""The style sheet, inlined into every page."""

from __future__ import annotations

CSS = """
body{margin:0;font:16px/1.6 Georgia,serif;color:#202122;background:#f6f6f4}
a{color:#24527a;text-decoration:none}a:hover{text-decoration:underline}
header{background:#24323f;color:#cfd8df;padding:14px 32px}
.brand{font-size:26px;color:#fff;margin-right:16px;letter-spacing:1px}
nav{background:#e4e7e8;padding:0 32px;font:14px/2.4 sans-serif}
nav ul{list-style:none;margin:0;padding:0;display:flex;gap:24px}
.columns{display:flex;max-width:1120px;margin:24px auto;gap:24px}
aside{width:170px;font:14px/1.6 sans-serif;padding:0 16px}aside ul{list-style:none;padding:0}
main{flex:1;background:#fff;border:1px solid #d5d8da;padding:8px 32px 32px}
h1{font-weight:normal;border-bottom:1px solid #a2a9b1;margin-bottom:12px}
h2{font-weight:normal;border-bottom:1px solid #dfe2e4;margin-top:28px}
table{border-collapse:collapse;font:14px/1.5 sans-serif}th,td{border:1px solid #c8ccd1;padding:5px 12px;text-align:left}
th{background:#eef0f2}.infobox{float:right;margin:0 0 16px 24px;min-width:240px;background:#fafafa}
.infobox caption{font-weight:bold;padding:6px}
.cookies,footer{text-align:center;font:13px/2 sans-serif;color:#666;padding:6px}.cookies{background:#fff7df}
""".strip()
