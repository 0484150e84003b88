"""A page with two touch pads and buttons, for a phone or a browser: a teleoperation device over one loopback port.

Only one page at a time has the pad. It speaks fifteen times a second; when it falls silent, or the connection ends,
nothing is held any more.
"""

import json
import threading
import time
from typing import Any

from websockets.sync.server import ServerConnection

from robot.devices import STILL, DeviceError, Reading
from robot.page import PageServer

SILENCE_S = 0.3
PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width,user-scalable=no">
<title>Cotwin pad</title><style>
body{margin:0;font:18px sans-serif;background:#181c20;color:#ddd;touch-action:none;user-select:none}
main{display:grid;grid-template-columns:1fr 1fr;gap:12px;padding:12px}
.pad{height:44vh;background:#262c33;border-radius:12px;display:grid;place-items:center;touch-action:none}
.pad.held{background:#2f5d3a}button{font:inherit;padding:14px;border:0;border-radius:8px;background:#39424c;color:#ddd}
nav{grid-column:1/3;display:flex;flex-wrap:wrap;gap:8px}#state{padding:12px}</style>
<main><div class="pad" id="left">forward, back, left, right</div><div class="pad" id="right">up, down, turn</div>
<nav><button data-hold>dead-man (hold)</button></nav></main><div id="state" role="status">connecting</div>
<script>
const motion=[0,0,0,0,0,0], held=new Set(); let pressed=[], deadman=false
const socket=new WebSocket(`ws://${location.host}/socket${location.search}`), state=document.getElementById('state')
socket.onopen=()=>state.textContent='connected'; socket.onclose=e=>state.textContent='not connected '+e.reason
const pad=(id,x,xs,y,ys)=>{const e=document.getElementById(id); let from=null
 const let_go=()=>{from=null; held.delete(id); e.classList.remove('held'); motion[x]=motion[y]=0}
 e.onpointerdown=p=>{from=[p.clientX,p.clientY]; held.add(id); e.classList.add('held')
  e.setPointerCapture(p.pointerId)}
 e.onpointermove=p=>{if(!from)return; const r=e.clientHeight/2, c=v=>Math.max(-1,Math.min(1,v/r))
  motion[x]=xs*c(p.clientX-from[0]); motion[y]=ys*c(p.clientY-from[1])}
 e.onpointerup=e.onpointercancel=e.onlostpointercapture=let_go}
pad('left',1,-1,0,-1); pad('right',5,-1,2,-1)
const hold=document.querySelector('[data-hold]'), nav=document.querySelector('nav')
hold.onpointerdown=()=>deadman=true; hold.onpointerup=hold.onpointerleave=hold.onpointercancel=()=>deadman=false
for(const name of ['gripper','slower','faster','start','success','failure','discard','undo']){
 const b=document.createElement('button'); b.textContent=name; b.onclick=()=>pressed.push(name); nav.append(b)}
addEventListener('blur',()=>{held.clear(); motion.fill(0); deadman=false})
setInterval(()=>{if(socket.readyState!==1)return; const clutch=held.size>0
 socket.send(JSON.stringify({motion,clutch,deadman:deadman||clutch,pressed})); pressed=[]},66)
</script>"""


class BrowserPad:
    """Serves the page at `url`. Raises DeviceError when the port is taken."""

    def __init__(self, host: str = "127.0.0.1", port: int = 8090):
        self._lock = threading.Lock()
        self._newest, self._pressed, self._heard_s = Reading(), [], 0.0  # of the page
        self._owner: ServerConnection | None = None
        try:
            self._server = PageServer("browser pad", PAGE, self._talk, host, port)
        except ValueError as error:
            raise DeviceError(str(error)) from error
        self.url = self._server.url

    def read(self) -> Reading:
        with self._lock:
            pressed, self._pressed = tuple(self._pressed), []
            if time.monotonic() - self._heard_s > SILENCE_S:
                return Reading(STILL, pressed=pressed)
            newest = self._newest
            return Reading(newest.motion, newest.clutch, newest.deadman, pressed)

    def close(self) -> None:
        self._server.close()

    def _talk(self, connection: ServerConnection) -> None:
        with self._lock:
            if self._owner is not None:
                connection.close(1013, "somebody else holds the pad")
                return
            self._owner = connection
        try:
            for message in connection:
                self._take(json.loads(message))
        finally:
            with self._lock:
                self._owner, self._newest = None, Reading()

    def _take(self, message: dict[str, Any]) -> None:
        motion = tuple(float(value) for value in message["motion"])
        reading = Reading(motion, message["clutch"] is True, message["deadman"] is True, tuple(message["pressed"]))
        with self._lock:
            self._newest, self._heard_s = reading, time.monotonic()
            self._pressed += reading.pressed
