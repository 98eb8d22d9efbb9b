// The page of a pipeops control plane. Everything from outside goes into the document as text,
// never as markup.
'use strict';
const $ = (id) => document.getElementById(id);
const clusters = new Map(); // id -> { data, tr, cells }
const headings = new Map(); // value of a group -> its row
const order = { duplicate: 0, offline: 1, expired: 2, late: 3, draining: 4, online: 5, revoked: 6 };
let session = null, source = null, shown = null, skew = 0, timer = null;

/** What cannot be seen, or turns the text around it, is named: two names that look the same are
 * the same. */
function seenText(key, value) {
  if (typeof value !== 'string') return value;
  return value.replace(/[\p{Cc}\p{Cf}\p{Co}\p{Zl}\p{Zp}\u034f\u115f\u1160\u2800\u3164\uffa0]/gu,
    (c) => '\n\t'.includes(c) ? c : `\\u{${c.codePointAt(0).toString(16)}}`);
}

/** An element with text or children in it. */
function el(name, options = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === 'text') node.textContent = value;
    else if (key === 'class') node.className = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

async function call(method, path, body) {
  const headers = { 'x-csrf-token': session ? session.csrf : '' };
  if (body !== undefined) headers['content-type'] = 'application/json';
  let answer;
  try {
    answer = await fetch(path,
      { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Error('The control plane is not reached.');
  }
  const text = await answer.text();
  let value = null;
  try { value = JSON.parse(text, seenText); } catch { /* an answer that is not ours */ }
  if (answer.ok) return value ?? text;
  const error = new Error(value && value.message
    ? value.message + (value.hint ? ` (${value.hint})` : '')
    : `The control plane answered ${answer.status}.`);
  error.status = answer.status;
  // a session that has ended is for the whole page to know; a wrong token is the form's own matter
  if (answer.status === 401 && session && path !== '/session') leave('The session is over.');
  throw error;
}

const now = () => Date.now() / 1000 + skew;
function ago(seconds) {
  const s = Math.max(0, Math.round(now() - seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86400)} d`;
}
const since = (text) => {
  const at = Date.parse(text) / 1000;
  return Number.isNaN(at) ? '' : `${ago(at)} ago`;
};

function show(name) {
  for (const id of ['login', 'fleet', 'cluster']) $(id).hidden = id !== name;
  $('nav').hidden = name === 'login';
  $('add').hidden = !session || !session.admin;
}

/* ---- fleet ---- */
function seen(c) { return c.state === 'online' ? 'now' : `${ago(c.seen_at)} ago`; }
function reason(c) {
  return c.reason && /^no heartbeat/.test(c.reason)
    ? `no heartbeat for ${ago(c.seen_at)}` : c.reason;
}
const tunnelOf = (c) => c.tunnel || '-';

function fill(entry) {
  const c = entry.data, [name, state, provider, version, nodes, tunnel, last] = entry.cells;
  name.firstChild.textContent = c.name;
  name.firstChild.href = '#/c/' + encodeURIComponent(c.id);
  state.firstChild.textContent = c.state;
  state.firstChild.className = 'state ' + c.state;
  state.lastChild.textContent = reason(c) ? ' ' + reason(c) : '';
  provider.textContent = [c.provider, c.region].filter(Boolean).join(' ') || '-';
  version.textContent = c.version || '-';
  nodes.textContent = c.nodes;
  tunnel.textContent = tunnelOf(c);
  last.textContent = seen(c);
}

function entryOf(c) {
  const columns = ['Name', 'State', 'Provider', 'Version', 'Nodes', 'Tunnel', 'Last seen']
    .map((label) => el('td', { 'data-label': label }));
  columns[0].append(el('a'));
  // state and reason in one box: a narrow screen lays cells out in two columns
  columns[1].append(el('span', {}, el('span'), el('span', { class: 'soft' })));
  const cells = columns.map((td, i) => (i === 1 ? td.firstChild : td));
  return { data: c, tr: el('tr', {}, ...columns), cells };
}

const labelsOf = (c) => Object.entries(c.labels || {}).map(([k, v]) => `${k}=${v}`);

function matches(c, words) {
  const text = [c.name, c.id, c.state, c.version, c.reason, c.project, c.provider, c.region, c.zone,
    ...labelsOf(c)].join(' ').toLowerCase();
  return words.every((w) => text.includes(w));
}

/** What a cluster is grouped by: a fact or a label. */
function valueOf(c, key) {
  const from = ['provider', 'region', 'zone'].includes(key) ? c : c.labels || {};
  return Object.hasOwn(from, key) ? from[key] : '';
}

function offerGroups(all) {
  const labels = new Set(all.flatMap((e) => Object.keys(e.data.labels || {})));
  const keys = ['', 'provider', 'region', 'zone', ...[...labels].sort()];
  const select = $('group'), chosen = select.value;
  if (keys.join() === [...select.options].map((o) => o.value).join()) return;
  select.replaceChildren(...keys.map((key) =>
    el('option', { value: key, text: key ? `By ${key}` : 'No groups' })));
  select.value = keys.includes(chosen) ? chosen : '';
}

/** The rows of a list, which is ordered by group, with a heading before each group. */
function grouped(list, key) {
  if (!key) return list.map((e) => e.tr);
  const counts = new Map();
  for (const e of list) {
    const value = valueOf(e.data, key);
    counts.set(value, (counts.get(value) || 0) + 1);
  }
  const rows = [];
  let last = null;
  for (const e of list) {
    const value = valueOf(e.data, key);
    if (value !== last) {
      if (!headings.has(value)) headings.set(value,
        el('tr', { class: 'group' }, el('th', { scope: 'rowgroup', colspan: '7' })));
      const heading = headings.get(value);
      heading.firstChild.textContent = `${key} ${value || 'not known'}: ${counts.get(value)}`;
      rows.push(heading);
      last = value;
    }
    rows.push(e.tr);
  }
  return rows;
}

function arrange() {
  const words = $('find').value.toLowerCase().split(/\s+/).filter(Boolean);
  const all = [...clusters.values()];
  offerGroups(all);
  const key = $('group').value;
  const list = all.filter((e) => matches(e.data, words));
  list.sort((a, b) => valueOf(a.data, key).localeCompare(valueOf(b.data, key))
    || order[a.data.state] - order[b.data.state]
    || a.data.name.localeCompare(b.data.name)
    || a.data.id.localeCompare(b.data.id));
  const rows = $('rows'), wanted = grouped(list, key);
  // rows that stand where they stood are not touched: focus and scroll stay
  if (rows.children.length !== wanted.length || wanted.some((tr, i) => rows.children[i] !== tr)) {
    const focused = document.activeElement;
    rows.replaceChildren(...wanted);
    if (focused && focused !== document.activeElement && rows.contains(focused))
      focused.focus({ preventScroll: true });
  }
  const counts = {};
  for (const e of all) counts[e.data.state] = (counts[e.data.state] || 0) + 1;
  $('census').textContent = all.length === 0 ? '' : `${all.length} in all: `
    + Object.keys(order).filter((s) => counts[s]).map((s) => `${counts[s]} ${s}`).join(', ');
  $('clusters').hidden = list.length === 0;
  $('empty').hidden = list.length > 0;
  $('empty').textContent = all.length > 0 ? 'No cluster fits what you look for.'
    : session && session.admin
      ? 'No cluster yet. “Add a server” gives the line to paste on a VM.'
      : 'No cluster that this token may see.';
}

function listen() {
  if (source) source.close();
  source = new EventSource('/api/v1/changes');
  source.onopen = () => { $('live').textContent = 'live'; };
  source.onerror = () => {
    $('live').textContent = 'The control plane is not reached; trying again…';
    // a refusal is not tried again by the browser: the session may be over, or the control plane
    // new
    if (source.readyState === EventSource.CLOSED) {
      clearTimeout(timer);
      timer = setTimeout(begin, 2000);
    }
  };
  source.addEventListener('clusters', (event) => {
    const { all, changed, gone, now: theirs } = JSON.parse(event.data, seenText);
    skew = theirs - Date.now() / 1000;
    const there = new Set(changed.map((c) => c.id));
    if (all) for (const id of [...clusters.keys()]) if (!there.has(id)) clusters.delete(id);
    for (const id of gone) clusters.delete(id);
    for (const c of changed) {
      const before = clusters.get(c.id), entry = before || entryOf(c);
      entry.data = c;
      fill(entry);
      entry.tr.classList.toggle('fresh', Boolean(before) || !all);
      clusters.set(c.id, entry);
    }
    if (!clusters.size || changed.length || gone.length) arrange();
    if (shown && (there.has(shown) || gone.includes(shown))) detail(shown, false);
  });
}

setInterval(() => {
  for (const e of clusters.values()) if (e.data.state !== 'online') fill(e);
}, 5000);

/* ---- one cluster ---- */
function table(head, rows, empty) {
  if (rows.length === 0) return el('p', { class: 'soft', text: empty });
  const body = rows.map((cells) => el('tr', {}, ...cells.map((cell, i) => {
    const td = el('td', { 'data-label': head[i] });
    td.append(cell instanceof Node ? cell : String(cell ?? ''));
    return td;
  })));
  return el('table', {},
    el('thead', {}, el('tr', {}, ...head.map((h) => el('th', { scope: 'col', text: h })))),
    el('tbody', {}, ...body));
}
const mark = (kind, text) => el('span', { class: 'state ' + kind, text });
const own = new Set(['kube-system', 'kube-public', 'kube-node-lease', 'pipeops', 'cert-manager',
  'istio-system', 'monitoring', 'ingress-nginx', 'traefik']);

function workload(kind, w) {
  const state = w.ready >= w.wanted
    ? mark('ok', `${w.ready}/${w.wanted}`)
    : mark(w.ready > 0 ? 'warn' : 'bad', `${w.ready}/${w.wanted}`);
  return [w.namespace, w.name, kind, state, w.images.join(', '), since(w.created)];
}

async function inside(id, what, target, draw) {
  try {
    const { items } = await call('GET',
      `/api/v1/clusters/${encodeURIComponent(id)}/inside/${what}`);
    if (shown === id) draw(items);
  } catch (error) {
    if (shown === id) for (const t of target)
      $(t).replaceChildren(el('p', { class: 'soft', text: error.message }));
  }
}

async function detail(id, focus) {
  let c;
  try {
    c = await call('GET', '/api/v1/clusters/' + encodeURIComponent(id));
  } catch (error) {
    if (shown !== id) return;
    $('cluster-title').textContent = id;
    $('cluster-error').textContent = error.message;
    return;
  }
  if (shown !== id) return;
  document.title = `${c.name} · pipeops`;
  $('cluster-title').textContent = c.name;
  $('cluster-state').replaceChildren(mark(c.state, c.state),
    el('span', { class: 'soft', text: reason(c) ? ' ' + reason(c) : '' }));
  $('cluster-error').textContent = '';
  for (const action of ['revoke', 'remove']) $(action).hidden = !session.admin;
  $('revoke').disabled = c.state === 'revoked';
  const report = c.report || {}, work = report.workloads || {}, memory = report.usage || {};
  const gib = (n) => (n / 2 ** 30).toFixed(1);
  const facts = [
    ['Id', c.id], ['Version', c.version || '-'], ['Provider', c.provider || '-'],
    ['Region', c.region || '-'], ['Zone', c.zone || '-'],
    ['Labels', labelsOf(c).join(', ') || '-'],
    ['Agent', c.agent_version], ['Tunnel', tunnelOf(c)], ['Last seen', seen(c)],
    ['Up for', c.uptime_s ? ago(now() - c.uptime_s) : '-'],
    ['Registered', `${ago(c.registered_at)} ago`], ['Highest role', c.max_role],
    ['Kubernetes', report.kubernetes
      ? report.kubernetes + (report.reason ? `: ${report.reason}` : '') : '-'],
    ['Pods', work.pods === undefined ? '-' : `${work.pods_running} of ${work.pods} running`],
    ['Memory', memory.memory_total_bytes
      ? `${gib(memory.memory_used_bytes)} of ${gib(memory.memory_total_bytes)} GiB` : '-'],
  ];
  $('facts').replaceChildren(...facts.map(([k, v]) => el('div', {},
    el('dt', { text: k }), el('dd', { text: v }))));
  $('nodes').replaceChildren(table(['Name', 'State', 'Role', 'Version', 'Address', 'Note'],
    (report.nodes || []).map((n) => [n.name,
      n.ready ? mark('ok', 'ready') : mark('bad', 'not ready'),
      n.role, n.version, n.address, n.note]),
    'Its agent has not reported yet.'));
  if (focus) $('cluster-title').focus({ preventScroll: true });
}

function look(id) {
  for (const part of ['workloads', 'components', 'events', 'audit'])
    $(part).replaceChildren(el('p', { class: 'soft', text: 'Asking the cluster…' }));
  const found = [];
  const kinds = [['deployments', 'Deployment'], ['statefulsets', 'StatefulSet'],
    ['daemonsets', 'DaemonSet']];
  for (const [what, kind] of kinds) {
    inside(id, what, ['workloads', 'components'], (items) => {
      found.push(...items.map((w) => workload(kind, w)));
      found.sort((a, b) => `${a[0]}/${a[1]}`.localeCompare(`${b[0]}/${b[1]}`));
      const head = ['Namespace', 'Name', 'Kind', 'Ready', 'Images', 'Age'];
      $('workloads').replaceChildren(table(head, found.filter((w) => !own.has(w[0])),
        'Nothing runs outside the system’s namespaces.'));
      $('components').replaceChildren(table(head, found.filter((w) => own.has(w[0])),
        'No controllers run.'));
    });
  }
  inside(id, 'events', ['events'], (items) => {
    items.sort((a, b) => Date.parse(b.at || 0) - Date.parse(a.at || 0));
    $('events').replaceChildren(table(['When', 'Kind', 'Object', 'Reason', 'Message'],
      items.slice(0, 50).map((e) => [since(e.at),
        mark(e.kind === 'Warning' ? 'warn' : 'ok', e.kind || ''),
        `${e.namespace || ''} ${e.object}`, e.reason, e.message]),
      'No events.'));
  });
  inside(id, 'audit', ['audit'], (items) => {
    $('audit').replaceChildren(table(['When', 'Who', 'What', 'Verdict'],
      items.reverse().map((r) => [since(r.at), `${r.subject} (${r.role})`,
        `${r.method} ${r.path}`, `${r.verdict} ${r.status || ''}`]),
      'Nothing was done through the tunnel yet.'));
  });
}

/* ---- moving about ---- */
function route() {
  if (!session) return;
  const found = /^#\/c\/(.+)$/.exec(location.hash);
  if (found) {
    try { shown = decodeURIComponent(found[1]); } catch { shown = found[1]; }
    show('cluster');
    $('cluster-title').textContent = '';
    detail(shown, true);
    look(shown);
  } else {
    shown = null;
    document.title = 'pipeops';
    show('fleet');
    arrange();
    $('fleet-title').focus({ preventScroll: true });
  }
}

function leave(why) {
  session = null;
  shown = null;
  if (source) source.close();
  source = null;
  clusters.clear();
  $('rows').replaceChildren();
  $('live').textContent = '';
  $('login-error').textContent = why || '';
  show('login');
  $('token').focus();
}

async function begin() {
  try {
    session = await call('GET', '/session');
  } catch (error) {
    if (error.status === 401 || error.status === 403) { leave(''); return; }
    $('live').textContent = error.message;
    clearTimeout(timer);
    timer = setTimeout(begin, 2000);
    return;
  }
  listen();
  route();
}

async function sure(title, text, yes) {
  const dialog = $('confirm');
  $('confirm-title').textContent = title;
  $('confirm-text').textContent = text;
  $('confirm-yes').textContent = yes;
  dialog.returnValue = 'no';
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener('close', done, { once: true }));
  return dialog.returnValue === 'yes';
}

async function act(title, text, yes, method, path) {
  if (!(await sure(title, text, yes))) return;
  try { await call(method, path); } catch (error) {
    $('cluster-error').textContent = error.message;
    return;
  }
  if (method === 'DELETE') location.hash = '#/'; else detail(shown, false);
}

$('login-form').addEventListener('submit', async (event) => {
  event.preventDefault();
  $('login-error').textContent = '';
  try {
    session = await call('POST', '/session', { token: $('token').value.trim() });
  } catch (error) {
    $('login-error').textContent = error.message;
    return;
  }
  $('token').value = '';
  listen();
  route();
});
$('logout').addEventListener('click', async () => {
  try { await call('DELETE', '/session'); } catch { /* it is over in any case */ }
  leave('');
});
$('find').addEventListener('input', arrange);
$('group').addEventListener('change', arrange);
$('add').addEventListener('click', async () => {
  $('ask').hidden = false; $('line').hidden = true;
  $('make').hidden = false; $('copy').hidden = true;
  $('adding-error').textContent = '';
  $('install').textContent = '';
  $('adding').showModal();
  try {
    const { items } = await call('GET', '/api/v1/projects');
    $('project').replaceChildren(...items.map((p) => el('option', { value: p.id, text: p.name })));
  } catch (error) { $('adding-error').textContent = error.message; }
});
$('adding-form').addEventListener('submit', async (event) => {
  event.preventDefault();
  if ($('ask').hidden) return;
  try {
    const made = await call('POST', '/api/v1/tokens', {
      project: $('project').value, name: $('label').value,
      uses: Number($('uses').value), ttl_s: Number($('hours').value) * 3600
    });
    $('install').textContent = made.install;
    $('ask').hidden = true; $('line').hidden = false;
    $('make').hidden = true; $('copy').hidden = false;
    $('adding-error').textContent = '';
    $('copy').textContent = 'Copy';
    $('copy').focus();
  } catch (error) { $('adding-error').textContent = error.message; }
});
$('copy').addEventListener('click', async () => {
  try {
    await navigator.clipboard.writeText($('install').textContent);
    $('copy').textContent = 'Copied';
  } catch {
    getSelection().selectAllChildren($('install'));
    $('copy').textContent = 'Press Ctrl+C';
  }
});
$('close').addEventListener('click', () => $('adding').close());
// what was shown once is not left in the document
$('adding').addEventListener('close', () => { $('install').textContent = ''; });
$('kubeconfig').addEventListener('click', async () => {
  try {
    const made = await call('POST', `/api/v1/clusters/${encodeURIComponent(shown)}/kubeconfig`, {});
    const url = URL.createObjectURL(new Blob([JSON.stringify(made, null, 2) + '\n'],
      { type: 'application/yaml' }));
    const link = el('a', { href: url, download: `${shown}.yaml` });
    link.click();
    URL.revokeObjectURL(url);
  } catch (error) { $('cluster-error').textContent = error.message; }
});
const path = () => `/api/v1/clusters/${encodeURIComponent(shown)}`;
$('revoke').addEventListener('click', () => act('Revoke this cluster?',
  'Its agent is refused from now on and everything open to it ends.',
  'Revoke', 'POST', path() + '/revoke'));
$('remove').addEventListener('click', () => act('Remove this cluster?',
  'It is forgotten here; its server goes on. Its agent needs a token to come back.',
  'Remove', 'DELETE', path()));
addEventListener('hashchange', route);
addEventListener('keydown', (event) => {
  if (event.key === '/' && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)
    && !$('fleet').hidden) {
    event.preventDefault();
    $('find').focus();
  }
});
begin();
