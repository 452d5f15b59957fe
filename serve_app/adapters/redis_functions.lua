#!lua name=inferpipe_v1
-- Every key, channel, TTL and function of the store.
--
-- p is KEYS[1], the prefix of one partition, "ip:{<partition>}": its braces put all keys below in
-- one hash slot, so that one call commits one transition atomically, on a cluster too. The key p
-- itself never exists: so a server that is giving the slot away key by key refuses every call to it
-- (ASK) before it begins, and no function sees half of its keys.
--
--   p:s:<execution>        hash    snapshot: seq owner status ws wf at prio watch created x st:<step>,
--                                  ask and due of one that may not start yet
--   p:j:<execution>        stream  journal: id "<seq>-0", fields k (kind) d (JSON) c (commit id);
--                                  the first entry's d is empty: the snapshot's `created` has it
--   p:b:<execution>        hash    payloads above the inline bound, by the name records refer to
--   p:line:<ws>            zset    executions without an owner that have work; score: priority, age
--   p:turns                zset    workspaces with a line; score: when their turn is, in virtual time
--   p:owed                 zset    those without one whose turn would be later than everybody's; likewise
--   p:depth                string  how many executions are in all lines
--   p:timers               zset    parked executions; score: when to wake, Unix ms
--   p:workers              zset    live workers; score: when the lease runs out, Unix ms
--   p:owned:<worker>       set     executions the worker owns
--   p:capacity             string  how many a worker may own in this partition
--   p:tokens               string  counter behind owner tokens
--   p:ix:<ws>[:wf:<id>|:st:<status>]  zset  executions by creation time
--   p:ends                 zset    "<execution> <status> <ws> <wf>" that ended; score: when to forget it
--   p:outbox               stream  messages for other partitions; p:seen zset, message ids applied here
--   p:sub:<ws>:<name>      hash    who waits for a topic's events ("<execution> <step>") -> since when
--   p:outbox:faults        hash    entry -> tries of one that cannot be applied; a day after the last
--   p:dead                 stream  messages given up: m t b as in the outbox, and why
--   p:log:<name>           stream  what the relay delivered here; LOG_TTL_MS after the last entry
--   p:ev:<ws>              stream  events of a workspace's topics here: n (name) b (JSON); cut and expired
--                                  by INFERPIPE_EVENTS_KEPT_MAX and INFERPIPE_EVENTS_RETENTION_S
--   p:gate:<name>          zset    executions inside a gate; :line zset, those that wait; :messages
--                                  hash, what they asked; :value string, a cached result, its ttl
--   p:rate:<name>          string  when a rate limit is next without debt; expires with it
--   p:use:<ws>:<day>       hash    usage counters by workflow and key; INFERPIPE_USAGE_RETENTION_DAYS
--   p:spent:<ws>           hash    key id -> tokens it ever spent here; expires 32 days after the last
--   p:in:<ingress>, p:w:<worker>, p:bell   sharded channels
--   p:sync, ip:{config}:sync  string  written so that WAIT has something to wait for
--   p:se:<session>         hash    ws model system at used count bytes order last, of a session
--   p:se:<session>:m       list    its messages, JSON
--   p:se:<session>:line    zset    its turns in order of arrival, the first is running; :held zset, until when
--   p:dl:<delivery>        hash    a delivery: wh ws ev ty body st n t at next log lease; expires once ended
--   p:dx:<webhook>         zset    an endpoint's deliveries by creation time, Unix ms
--   p:dq:<webhook>         zset    those that wait; score: when the next try is due
--   p:dh:<webhook>         hash    its health: win flying fails since until served
--   p:de                   zset    endpoints with something to send; score: when to look at them
--   p:dw, p:do:<dispatcher>  zset  live dispatchers, score: lease's end; hash, what each is sending
--   p:dc, p:dn             hash    limits the dispatchers were started with; string, counter of leases
--   p:due                  sharded channel: an endpoint has become due
--   ip:{config}:hooks:<ws>    hash  webhook id -> "<revision> <record>"
--   ip:{config}:wf:<ws>:<id>  hash  version -> definition, at:<version>, latest (live), last (ever)
--   ip:{config}:wfs:<ws>      set   ids of live definitions
--   ip:{config}:trig:<ws>     hash  id -> latest version, of live definitions that events start
--   ip:{config}:in:<ws>       hash  workflow id -> the sealed secrets of its hook
--   ip:{config}:cron          zset  "<ws> <id>" of live definitions with a clock; score: when it is due, Unix ms
--   ip:{config}:cron:from     hash  the same -> "<ms up to which all was started> <version>"; :owner string, lease
--   ip:{config}:keys          hash  key hash -> record
--   ip:{config}:replicas      hash  replica id -> last report; sharded channel ip:{config}:reports
--   ip:{config}:limit:<ws>:<key>  hash  requests and tokens of a limited key; lasts for its window
--   ip:{config}:metrics       hash  process -> when and what it last published of its metrics
--   ip:{config}:once:<digest> hash  body, claim, answer of one Idempotency-Key; 60 s, with an answer 24 h
--
-- Snapshot, journal and payloads expire `retention` ms after the terminal event; commits and heartbeats
-- then take the execution out of the indexes (`forget`), a bounded number at a time and without a
-- scan. Everything else goes with its owner. Times are the server's own (TIME), so workers need not agree on the hour.

local WATCHERS_MAX = 8        -- ingresses told of one execution; the oldest is dropped, it re-reads
local DUE_MAX = 128           -- timers fired in one heartbeat; the rest by the next, at once
local SEEN_TTL_MS = 86400000  -- a message is de-duplicated for a day, far beyond any relay's retry
local PUBLISH_MAX = 65536     -- bytes of events carried by a bell; beyond it the reader reads
local FORGET_MAX = 64         -- expired executions taken out of the indexes in one heartbeat
local FORGET_AT_END = 2       -- and in each commit that ends one, so that they go as fast as they come
local SPENT_TTL_MS = 2764800000  -- longer than the longest window of a key's limit
local LOG_MAX = 1000          -- entries kept of a relayed log
local LOG_TTL_MS = 604800000  -- a week: names come and go with workflows
local FAULTS_MAX = 10         -- tries of a message that cannot be applied, and for how long, until it
local FAULTY_FOR_MS = 60000   -- is given up: others wait behind it
local DEAD_MAX = 1000         -- of those, kept to be looked at

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function text(n)
  return string.format('%.0f', n)
end

-- Executions that wait for a worker stand in their workspace's line, by priority and age, and the
-- workspaces take turns: start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996) with a cost of
-- one for each execution, so a workspace that queues thousands puts another off by one execution and
-- no more. Virtual time is the first of the turns; a line that begins gets its turn there, unless
-- what it had lately owes it a later one. O(log n); what is owed is dropped once it is past.
local function turns(p, first, last)
  return redis.call('ZRANGE', p .. ':turns', first, last, 'WITHSCORES')
end

local function line_up(p, ws, eid, prio)
  local line = p .. ':line:' .. ws
  local place = text(now_ms() - (tonumber(prio) or 0) * 1e13)
  if redis.call('ZADD', line, 'NX', place, eid) == 0 then return end
  redis.call('INCR', p .. ':depth')
  redis.call('SPUBLISH', p .. ':bell', cmsgpack.pack({'ready'}))
  if redis.call('ZCARD', line) > 1 then return end
  local first, owed = turns(p, 0, 0)[2], redis.call('ZSCORE', p .. ':owed', ws)
  local turn = first and math.max(tonumber(first), tonumber(owed or '0')) or 0
  redis.call('ZADD', p .. ':turns', text(turn), ws)
  redis.call('ZREM', p .. ':owed', ws)
  if not first then redis.call('DEL', p .. ':owed') end
end

-- So many have left the line of a workspace, whose next turn is at `turn`.
local function left_line(p, ws, turn, count)
  redis.call('DECRBY', p .. ':depth', count)
  if redis.call('EXISTS', p .. ':line:' .. ws) == 1 then
    redis.call('ZADD', p .. ':turns', text(turn), ws)
  else
    redis.call('ZREM', p .. ':turns', ws)
    redis.call('ZADD', p .. ':owed', text(turn), ws)
  end
end

local function step_out(p, ws, eid)
  if redis.call('ZREM', p .. ':line:' .. ws, eid) == 1 then
    left_line(p, ws, tonumber(redis.call('ZSCORE', p .. ':turns', ws)), 1)
  end
end

-- The executions whose turn it is, at most `limit`.
local function next_in_line(p, limit)
  local got = {}
  while #got < limit do
    local first = turns(p, 0, 1)
    local ws, alone = first[1], not first[3]
    if not ws then break end
    local popped = redis.call('ZPOPMIN', p .. ':line:' .. ws, alone and limit - #got or 1)
    for i = 1, #popped, 2 do got[#got + 1] = popped[i] end
    left_line(p, ws, tonumber(first[2]) + math.max(1, #popped / 2), #popped / 2)
  end
  local first = turns(p, 0, 0)[2]
  if first then redis.call('ZREMRANGEBYSCORE', p .. ':owed', '-inf', first) end
  return got
end

local function depth(p)
  return tonumber(redis.call('GET', p .. ':depth') or '0')
end

-- Whether one more of this workspace is too many: all lines are full, and its own has its share.
local function is_full(p, ws, waiting, limit)
  if waiting < limit then return false end
  local count = redis.call('ZCARD', p .. ':turns')
  if not redis.call('ZSCORE', p .. ':turns', ws) then count = count + 1 end
  return redis.call('ZCARD', p .. ':line:' .. ws) >= limit / count
end

-- Put an execution that has work to a live worker with room, or into its line.
local function assign(p, ws, eid, prio, created)
  local now = now_ms()
  local capacity = tonumber(redis.call('GET', p .. ':capacity') or '0')
  local best, least
  if capacity > 0 then
    for _, w in ipairs(redis.call('ZRANGEBYSCORE', p .. ':workers', '(' .. text(now), '+inf', 'LIMIT', 0, 64)) do
      local n = redis.call('SCARD', p .. ':owned:' .. w)
      if n < capacity and (not least or n < least) then best, least = w, n end
    end
  end
  if best then
    local token = best .. '/' .. redis.call('INCR', p .. ':tokens')
    redis.call('HSET', p .. ':s:' .. eid, 'owner', token)
    redis.call('SADD', p .. ':owned:' .. best, eid)
    redis.call('SPUBLISH', p .. ':w:' .. best, cmsgpack.pack({'start', eid, token, created or ''}))
    return token
  end
  line_up(p, ws, eid, prio)
  return ''
end

local function tell(p, watch, worker, eid, first, events, size)
  if (not watch or watch == '') and not worker then return end
  local carried = size <= PUBLISH_MAX and events or {}
  local message = cmsgpack.pack({'events', eid, first, first + #events - 1, carried})
  for ingress in string.gmatch(watch or '', '%S+') do
    redis.call('SPUBLISH', p .. ':in:' .. ingress, message)
  end
  if worker then redis.call('SPUBLISH', p .. ':w:' .. worker, message) end
end

local function entries(p, eid, after, count)
  local found = {}
  local from = string.format('%.0f-1', after)
  for _, entry in ipairs(redis.call('XRANGE', p .. ':j:' .. eid, from, '+', 'COUNT', count)) do
    local f = entry[2]
    found[#found + 1] = {tonumber(string.match(entry[1], '^(%d+)')), f[2], f[4], f[6]}
  end
  return found
end

-- An owner's commit id, "<worker>/<token>.<n>", is unique in its partition without the worker.
local function short(commit_id)
  return string.match(commit_id, '[^/]*$')
end

local function append(p, eid, seq, commit_id, args, at, n)
  local events, size = {}, 0
  for i = 1, n do
    local kind, data = args[at], args[at + 1]
    redis.call('XADD', p .. ':j:' .. eid, text(seq + i) .. '-0', 'k', kind, 'd', data, 'c', commit_id)
    events[i] = {kind, data, commit_id}
    size = size + #data
    at = at + 2
  end
  return events, size, at
end

-- Count what an execution or a call used; nine arguments from `at`:
-- day ttl_ms counter_prefix key prompt cached completion wasted_name wasted
local function book(p, ws, args, at)
  local use, prefix = p .. ':use:' .. ws .. ':' .. args[at], args[at + 2]
  local counts = {
    {'requests', '1'}, {'prompt', args[at + 4]}, {'cached', args[at + 5]},
    {'completion', args[at + 6]}, {args[at + 7], args[at + 8]},
  }
  for _, c in ipairs(counts) do
    if c[2] ~= '0' then redis.call('HINCRBY', use, prefix .. c[1], c[2]) end
  end
  redis.call('PEXPIRE', use, args[at + 1])
  local tokens = tonumber(args[at + 4]) + tonumber(args[at + 6])
  if args[at + 3] ~= '' and tokens > 0 then
    redis.call('HINCRBY', p .. ':spent:' .. ws, args[at + 3], text(tokens))
    redis.call('PEXPIRE', p .. ':spent:' .. ws, SPENT_TTL_MS)
  end
end

local function is_known(p, message_id)
  return redis.call('ZSCORE', p .. ':seen', message_id)
end

-- Noted last: a function that fails keeps what it wrote, and a message noted first would be lost.
local function note(p, message_id)
  local now = now_ms()
  redis.call('ZADD', p .. ':seen', text(now), message_id)
  redis.call('ZREMRANGEBYSCORE', p .. ':seen', '-inf', text(now - SEEN_TTL_MS))
  redis.call('PEXPIRE', p .. ':seen', SEEN_TTL_MS)
end

-- Leave nothing of an execution that ended; `ending` is its member of p:ends.
local function forget(p, ending)
  local eid, status, ws, wf = string.match(ending, '^(%S+) (%S+) (%S+) (.*)$')
  local ix = p .. ':ix:' .. ws
  redis.call('UNLINK', p .. ':s:' .. eid, p .. ':j:' .. eid, p .. ':b:' .. eid)
  redis.call('ZREM', p .. ':ends', ending)
  redis.call('ZREM', ix, eid)
  redis.call('ZREM', ix .. ':wf:' .. wf, eid)
  redis.call('ZREM', ix .. ':st:' .. status, eid)
end

local function forget_expired(p, count)
  for _, ending in ipairs(redis.call('ZRANGEBYSCORE', p .. ':ends', '-inf', text(now_ms()), 'LIMIT', 0, count)) do
    forget(p, ending)
  end
end

-- Hold a workspace to `kept` executions here: the oldest that has ended goes before its time. Two
-- at a time, so that a bound that was lowered is reached as new ones come.
local function forget_beyond(p, ws, kept)
  local ix = p .. ':ix:' .. ws
  for _ = 1, FORGET_AT_END do
    if redis.call('ZCARD', ix) <= kept then return end
    local oldest, at, ended_as
    for _, status in ipairs({'completed', 'failed', 'cancelled'}) do
      local first = redis.call('ZRANGE', ix .. ':st:' .. status, 0, 0, 'WITHSCORES')
      if first[1] and (not at or tonumber(first[2]) < at) then
        oldest, at, ended_as = first[1], tonumber(first[2]), status
      end
    end
    if not oldest then return end
    local wf = redis.call('HGET', p .. ':s:' .. oldest, 'wf')
    if not wf then return end  -- it has expired, and is forgotten by its own time
    forget(p, table.concat({oldest, ended_as, ws, wf}, ' '))
  end
end

-- Keep the payloads that stand in the arguments from `at`: n (name bytes)*
local function keep_payloads(p, eid, args, at)
  for i = 1, tonumber(args[at]) do
    redis.call('HSET', p .. ':b:' .. eid, args[at + 2 * i - 1], args[at + 2 * i])
  end
  return at + 1 + 2 * tonumber(args[at])
end

-- An execution asks a gate, and waits for the answer until its deadline ('': for ever).
local function ask(p, eid, message, deadline_ms)
  redis.call('XADD', p .. ':outbox', '*', 'm', message[1], 't', message[2], 'b', message[3])
  if deadline_ms ~= '' then redis.call('ZADD', p .. ':timers', deadline_ms, eid) end
end

-- create: eid commit_id data ws workflow created_ms priority watcher backlog_max start_ms deadline_ms
--         payloads_n (name bytes)* out_n (message_id target body)* [message_id target body]
-- With a last message it waits for the answer, at most until its deadline, before it goes to a worker.
local function create(keys, args)
  local p, eid = keys[1], args[1]
  local s = p .. ':s:' .. eid
  if redis.call('EXISTS', s) == 1 then return {'same', redis.call('HGETALL', s)} end
  local ws, workflow, at = args[4], args[5], args[6]
  local waiting = depth(p)
  if is_full(p, ws, waiting, tonumber(args[9])) then return {'overloaded'} end
  local m = keep_payloads(p, eid, args, 12)
  for _ = 1, tonumber(args[m]) do
    redis.call('XADD', p .. ':outbox', '*', 'm', args[m + 1], 't', args[m + 2], 'b', args[m + 3])
    m = m + 3
  end
  m = m + 1
  local message = args[m] and {args[m], args[m + 1], args[m + 2]}
  redis.call('XADD', p .. ':j:' .. eid, '1-0', 'k', 'execution.created', 'd', '', 'c', args[2])
  redis.call('HSET', s, 'seq', '1', 'owner', '', 'status', 'pending', 'ws', ws, 'wf', workflow,
    'at', at, 'prio', args[7], 'watch', args[8], 'created', args[3])
  redis.call('ZADD', p .. ':ix:' .. ws, at, eid)
  redis.call('ZADD', p .. ':ix:' .. ws .. ':wf:' .. workflow, at, eid)
  redis.call('ZADD', p .. ':ix:' .. ws .. ':st:pending', at, eid)
  if tonumber(args[10]) > now_ms() then
    if message then redis.call('HSET', s, 'ask', cmsgpack.pack(message), 'due', args[11]) end
    redis.call('ZADD', p .. ':timers', args[10], eid)
  elseif message then
    ask(p, eid, message, args[11])
  elseif waiting > 0 then
    line_up(p, ws, eid, args[7])  -- a place that has just become free is another's
  else
    assign(p, ws, eid, args[7], #args[3] <= PUBLISH_MAX and args[3] or '')
  end
  return {'new'}
end

-- commit: eid commit_id expected token status verb arg events_n (kind data)* fields_n (name value)*
--         out_n (message_id target body)* payloads_n (name bytes)*
--         [with verb end: kept_max, what `book` takes]
-- verb: keep | park (arg: wake ms) | end (arg: retention ms) | append (by somebody else than the owner)
local function commit(keys, args)
  local p, eid, commit_id, token, verb = keys[1], args[1], short(args[2]), args[4], args[6]
  local s = p .. ':s:' .. eid
  local h = redis.call('HMGET', s, 'seq', 'owner', 'status', 'ws', 'at', 'watch', 'prio', 'wf')
  if not h[1] then return {'gone'} end
  local seq, expected, owner = tonumber(h[1]), tonumber(args[3]), h[2]
  -- A fail-over lost what the committer has seen: it must begin again from what is left.
  if seq < expected then return {'stale'} end
  if seq ~= expected then
    local missed = entries(p, eid, expected, 1000)
    local is_ours = missed[1] and missed[1][4] == commit_id
    if token ~= '' and owner ~= token and not is_ours then return {'stale'} end
    return {is_ours and 'same' or 'conflict', missed}
  end
  if token ~= '' and owner ~= token then return {'stale'} end

  local n, at = tonumber(args[8]), 9
  local events, size
  events, size, at = append(p, eid, seq, commit_id, args, at, n)
  local status, set = args[5], {'seq', text(seq + n), 'status', args[5]}
  for _ = 1, tonumber(args[at]) do
    set[#set + 1], set[#set + 2] = args[at + 1], args[at + 2]
    at = at + 2
  end
  at = at + 1
  for _ = 1, tonumber(args[at]) do
    redis.call('XADD', p .. ':outbox', '*', 'm', args[at + 1], 't', args[at + 2], 'b', args[at + 3])
    at = at + 3
  end
  at = keep_payloads(p, eid, args, at + 1)
  local worker = string.match(owner, '^(.*)/')
  if verb == 'park' or verb == 'end' then
    set[#set + 1], set[#set + 2] = 'owner', ''
    redis.call('SREM', p .. ':owned:' .. worker, eid)
  end
  redis.call('HSET', s, unpack(set))
  if status ~= h[3] then
    redis.call('ZREM', p .. ':ix:' .. h[4] .. ':st:' .. h[3], eid)
    redis.call('ZADD', p .. ':ix:' .. h[4] .. ':st:' .. status, h[5], eid)
  end
  if verb == 'park' then
    redis.call('ZADD', p .. ':timers', args[7], eid)
  elseif verb == 'end' then
    redis.call('PEXPIRE', s, args[7])
    redis.call('PEXPIRE', p .. ':j:' .. eid, args[7])
    redis.call('PEXPIRE', p .. ':b:' .. eid, args[7])
    local ending = table.concat({eid, status, h[4], h[8]}, ' ')
    redis.call('ZADD', p .. ':ends', text(now_ms() + tonumber(args[7])), ending)
    book(p, h[4], args, at + 1)
    forget_expired(p, FORGET_AT_END)
    forget_beyond(p, h[4], tonumber(args[at]))
  end
  tell(p, h[6], verb == 'append' and worker, eid, seq + 1, events, size)
  if verb == 'append' and owner == '' then
    -- It may wait on a timer or on the queue; a worker that has it must be its only place.
    redis.call('ZREM', p .. ':timers', eid)
    step_out(p, h[4], eid)
    assign(p, h[4], eid, h[7])
  end
  return {'new', depth(p)}
end

local function reap(p, worker)
  redis.call('ZREM', p .. ':workers', worker)
  local orphans = redis.call('SMEMBERS', p .. ':owned:' .. worker)
  redis.call('DEL', p .. ':owned:' .. worker)
  for _, eid in ipairs(orphans) do
    local h = redis.call('HMGET', p .. ':s:' .. eid, 'owner', 'prio', 'ws')
    if h[1] and string.match(h[1], '^(.*)/') == worker then
      redis.call('HSET', p .. ':s:' .. eid, 'owner', '')
      assign(p, h[3], eid, h[2])
    end
  end
  return #orphans
end

-- heartbeat: worker ttl_ms capacity
-- -> {now, next timer or -1, ready depth, owned count, outbox length, reaped, {live worker...}}
local function heartbeat(keys, args)
  local p, worker = keys[1], args[1]
  local now = now_ms()
  -- Only a worker in good standing takes from others: after an outage of the server all leases
  -- have run out, and whoever comes first would take from the living.
  local lease = redis.call('ZSCORE', p .. ':workers', worker)
  redis.call('ZADD', p .. ':workers', text(now + tonumber(args[2])), worker)
  redis.call('SET', p .. ':capacity', args[3])
  local reaped = 0
  if lease and tonumber(lease) > now then
    for _, w in ipairs(redis.call('ZRANGEBYSCORE', p .. ':workers', '-inf', text(now), 'LIMIT', 0, 8)) do
      reaped = reaped + reap(p, w)
    end
  end
  for _, eid in ipairs(redis.call('ZRANGEBYSCORE', p .. ':timers', '-inf', text(now), 'LIMIT', 0, DUE_MAX)) do
    redis.call('ZREM', p .. ':timers', eid)
    local s = p .. ':s:' .. eid
    local h = redis.call('HMGET', s, 'owner', 'prio', 'ask', 'due', 'ws')
    if h[1] == '' and h[3] then
      redis.call('HDEL', s, 'ask', 'due')
      ask(p, eid, cmsgpack.unpack(h[3]), h[4])
    elseif h[1] == '' then
      assign(p, h[5], eid, h[2])
    end
  end
  local queued = redis.call('ZPOPMIN', p .. ':ready', DUE_MAX)  -- of a version that had one queue
  for i = 1, #queued, 2 do
    local h = redis.call('HMGET', p .. ':s:' .. queued[i], 'ws', 'prio')
    if h[1] then line_up(p, h[1], queued[i], h[2]) end
  end
  forget_expired(p, FORGET_MAX)
  local next_timer = redis.call('ZRANGE', p .. ':timers', 0, 0, 'WITHSCORES')
  return {
    text(now), next_timer[2] or '-1', depth(p),
    redis.call('SCARD', p .. ':owned:' .. worker), redis.call('XLEN', p .. ':outbox'), reaped,
    redis.call('ZRANGEBYSCORE', p .. ':workers', '(' .. text(now), '+inf', 'LIMIT', 0, 64),
  }
end

-- live_workers -> how many have a lease
local function live_workers(keys)
  return redis.call('ZCOUNT', keys[1] .. ':workers', '(' .. text(now_ms()), '+inf')
end

-- claim: worker limit -> {{eid, token, snapshot}...}
local function claim(keys, args)
  local p, worker, got = keys[1], args[1], {}
  for _, eid in ipairs(next_in_line(p, tonumber(args[2]))) do
    local s = p .. ':s:' .. eid
    if redis.call('HGET', s, 'owner') == '' then
      local token = worker .. '/' .. redis.call('INCR', p .. ':tokens')
      redis.call('HSET', s, 'owner', token)
      redis.call('SADD', p .. ':owned:' .. worker, eid)
      got[#got + 1] = {eid, token, redis.call('HGETALL', s)}
    end
  end
  return got
end

-- owned: worker -> {{eid, token, snapshot}...}: what a worker owns, for one that missed a push
local function owned(keys, args)
  local p, got = keys[1], {}
  for _, eid in ipairs(redis.call('SMEMBERS', p .. ':owned:' .. args[1])) do
    local snapshot = redis.call('HGETALL', p .. ':s:' .. eid)
    if #snapshot > 0 then
      got[#got + 1] = {eid, redis.call('HGET', p .. ':s:' .. eid, 'owner'), snapshot}
    else
      redis.call('SREM', p .. ':owned:' .. args[1], eid)
    end
  end
  return got
end

-- watch: eid ingress -> {} or snapshot: from now on commits are told to the ingress too
local function watch(keys, args)
  local s = keys[1] .. ':s:' .. args[1]
  local present = redis.call('HGET', s, 'watch')
  if not present then return {} end
  local kept = {}
  for ingress in string.gmatch(present, '%S+') do
    if ingress ~= args[2] then kept[#kept + 1] = ingress end
  end
  kept[#kept + 1] = args[2]
  while #kept > WATCHERS_MAX do table.remove(kept, 1) end
  redis.call('HSET', s, 'watch', table.concat(kept, ' '))
  return redis.call('HGETALL', s)
end

-- apply: message_id log body -> 1 when it is new here
local function apply(keys, args)
  local p = keys[1]
  if is_known(p, args[1]) then return 0 end
  local log = p .. ':log:' .. args[2]
  redis.call('XADD', log, 'MAXLEN', '~', LOG_MAX, '*', 'm', args[1], 'b', args[3])
  redis.call('PEXPIRE', log, LOG_TTL_MS)
  note(p, args[1])
  return 1
end

-- fault: entry why -> 1 when the message is given up
-- It could not be applied, and not because a server was away. What waits behind it must not wait for ever.
local function fault(keys, args)
  local p, entry = keys[1], args[1]
  local row = redis.call('XRANGE', p .. ':outbox', entry, entry)[1]
  if not row then return 0 end
  local faults = redis.call('HINCRBY', p .. ':outbox:faults', entry, 1)
  redis.call('PEXPIRE', p .. ':outbox:faults', SEEN_TTL_MS)
  local age = now_ms() - tonumber(string.match(entry, '^%d+'))
  if faults < FAULTS_MAX or age < FAULTY_FOR_MS then return 0 end
  local f = row[2]
  redis.call('XADD', p .. ':dead', 'MAXLEN', '~', DEAD_MAX, '*', 'm', f[2], 't', f[4], 'b', f[6], 'why', args[2])
  redis.call('XDEL', p .. ':outbox', entry)
  redis.call('HDEL', p .. ':outbox:faults', entry)
  return 1
end

-- spend: id ws, then what `book` takes -> 1 when the entry is new
local function spend(keys, args)
  if is_known(keys[1], args[1]) then return 0 end
  book(keys[1], args[2], args, 3)
  note(keys[1], args[1])
  return 1
end

-- Nothing starts a definition by itself any more.
local function untrigger(p, ws, id)
  redis.call('HDEL', p .. ':trig:' .. ws, id)
  redis.call('ZREM', p .. ':cron', ws .. ' ' .. id)
  redis.call('HDEL', p .. ':cron:from', ws .. ' ' .. id)
end

-- define: ws id definition base has_events has_clock -> {version, 1 when it is new}
-- The same definition again keeps its version. Numbers go on from `base`, the latest of the
-- definition that this one overrides, so that a number means one definition in a workspace.
local function define(keys, args)
  local key = keys[1] .. ':wf:' .. args[1] .. ':' .. args[2]
  local latest = tonumber(redis.call('HGET', key, 'latest') or '0')
  redis.call('SADD', keys[1] .. ':wfs:' .. args[1], args[2])
  if latest > 0 and redis.call('HGET', key, text(latest)) == args[3] then return {latest, 0} end
  untrigger(keys[1], args[1], args[2])
  local version = math.max(tonumber(redis.call('HGET', key, 'last') or '0'), tonumber(args[4])) + 1
  redis.call('HSET', key, text(version), args[3], 'latest', version, 'last', version,
    'at:' .. text(version), text(now_ms()))
  if args[5] == '1' then redis.call('HSET', keys[1] .. ':trig:' .. args[1], args[2], version) end
  if args[6] == '1' then
    local clock = args[1] .. ' ' .. args[2]
    redis.call('ZADD', keys[1] .. ':cron', 0, clock)
    redis.call('HSET', keys[1] .. ':cron:from', clock, text(now_ms()) .. ' ' .. text(version))
  end
  return {version, 1}
end

-- undefine: ws id -> 1 when it was there; versions stay for the executions that run them
local function undefine(keys, args)
  redis.call('SREM', keys[1] .. ':wfs:' .. args[1], args[2])
  untrigger(keys[1], args[1], args[2])
  return redis.call('HDEL', keys[1] .. ':wf:' .. args[1] .. ':' .. args[2], 'latest')
end

-- triggered: ws shipped -> {ws's own id, version...}, {shipped id, version...}: what events start;
-- a shipped one that the workspace has overridden is left out
local function triggered(keys, args)
  local theirs, shipped = {}, redis.call('HGETALL', keys[1] .. ':trig:' .. args[2])
  for i = 1, #shipped, 2 do
    if redis.call('SISMEMBER', keys[1] .. ':wfs:' .. args[1], shipped[i]) == 0 then
      theirs[#theirs + 1], theirs[#theirs + 2] = shipped[i], shipped[i + 1]
    end
  end
  return {redis.call('HGETALL', keys[1] .. ':trig:' .. args[1]), theirs}
end

redis.register_function('ip1_create', create)
redis.register_function('ip1_commit', commit)
redis.register_function('ip1_heartbeat', heartbeat)
redis.register_function('ip1_live_workers', live_workers)
redis.register_function('ip1_claim', claim)
redis.register_function('ip1_owned', owned)
redis.register_function('ip1_watch', watch)
redis.register_function('ip1_reap', function(keys, args) return reap(keys[1], args[1]) end)
redis.register_function('ip1_apply', apply)
redis.register_function('ip1_fault', fault)
redis.register_function('ip1_spend', spend)
redis.register_function('ip1_define', define)
redis.register_function('ip1_undefine', undefine)
redis.register_function('ip1_triggered', triggered)
